"""Standard streams that are closed, full or gone, and signals that end a command."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from commands import TIMEOUT_S, command_line, environment
from terminal import Screened

from offmoe.trace.reader import read_trace

if sys.platform != "linux":
    pytest.skip("closes descriptors and writes to /dev/full as Linux has them", allow_module_level=True)

FULL = "error: standard output cannot be written: No space left on device"
GENERATE = ("generate", "--prompt", "hi", "--max-new-tokens", "2", "--ram", "4GiB")
ENDLESS = ("generate", "--prompt", "def f(x):", "--max-new-tokens", "2000", "--temperature", "1.5", "--seed", "1")


def shell(redirections: str, *args: str) -> subprocess.CompletedProcess[str]:
    """A command whose streams are redirected as `redirections` say; its input ends at once."""
    command = ["sh", "-c", f'exec "$@" {redirections}', "sh", *command_line(*args)]
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT_S, env=environment(),
        check=False,
    )  # fmt: skip


@pytest.mark.parametrize("redirections", ["<&-", "2>&-", "2>/dev/full", ">&-", "<&- >&- 2>&-"])
def test_closed_streams(redirections: str) -> None:
    done = shell(redirections, "inspect")
    assert (done.returncode, done.stderr) == (0, "")
    assert ("demo_model" in done.stdout) == (">&-" not in redirections.replace("2>&-", ""))


def test_a_closed_input_is_an_empty_one() -> None:
    done = shell("<&-", "chat", "-")
    assert (done.returncode, done.stderr) == (2, "error: standard input is empty; give a message\n")


def test_a_reply_without_anybody_to_read_messages() -> None:
    """The checkpoint is not opened as descriptor 2, into which libraries write."""
    done = shell("<&- 2>&-", "chat", "--ram", "4GiB")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = shell("2>&-", *GENERATE, "--temperature", "0")
    assert (done.returncode, done.stdout) == (0, " = self\n")


@pytest.mark.parametrize("args", [("--help",), ("--version",), ("inspect",), ("inspect", "--json"), GENERATE])
def test_a_full_disk_behind_the_output(args: tuple[str, ...]) -> None:
    done = shell(">/dev/full", *args)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == FULL and "Traceback" not in done.stderr


def test_an_error_whose_line_nobody_reads() -> None:
    assert shell("2>/dev/full", "inspect", "nowhere").returncode == 2
    assert shell(">/dev/full 2>/dev/full", "--help").returncode == 2


def test_terminated_while_generating() -> None:
    args = command_line(*ENDLESS)
    with subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as process:
        assert process.stdout is not None and process.stdout.read(1)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 128 + signal.SIGTERM
    assert errors.splitlines()[-1] == b"stopped" and b"Traceback" not in errors


def test_terminated_while_tracing_keeps_what_is_whole(tmp_path: Path) -> None:
    prompts, trace = tmp_path / "prompts", tmp_path / "a.trace"
    prompts.write_text("def f(x):\n" * 200)
    args = command_line("trace", "--prompts", prompts, "-o", trace, "--max-new-tokens", 200)
    with subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as process:
        partial = tmp_path / "a.trace.partial"
        while process.poll() is None and not (partial.exists() and partial.stat().st_size > 1000):
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 128 + signal.SIGTERM
    found = read_trace(trace)
    assert found.num_decoded > 0 and not found.is_complete
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.trace", "prompts"]


def test_terminated_at_a_prompt_restores_the_terminal(tmp_path: Path) -> None:
    """The editor holds the terminal in raw mode, without echo."""
    keyboard, screen = pty.openpty()
    before = termios.tcgetattr(screen)
    settings = environment(TERM="xterm", XDG_STATE_HOME=str(tmp_path))
    args = command_line("chat", "--ram", "4GiB")
    with (
        Screened(keyboard, 80, 24) as shown,
        subprocess.Popen(args, stdin=screen, stdout=screen, stderr=screen, env=settings) as process,
    ):
        shown.expect(r"\x1b\[\?2004h")
        assert termios.tcgetattr(screen) != before
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT_S) == 128 + signal.SIGTERM
        assert termios.tcgetattr(screen) == before
        os.close(screen)
        shown.drain()
    assert "Traceback" not in shown.shown and "\x1b[?2004l" in shown.shown
