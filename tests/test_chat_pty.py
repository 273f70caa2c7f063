"""`offmoe chat` before a person: prompt, streaming reply, one line of statistics, Ctrl-C that spares the chat."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

if sys.platform == "win32":
    pytest.skip("a pseudo-terminal is POSIX", allow_module_level=True)

from commands import command_line, environment
from terminal import CTRL_C, CTRL_D, Terminal

from offmoe.checkpoint.locate import demo_model_folder

STATS = r"\d+ tokens, [\d.]+ tok/s \| first token [^\n]* for the prompt\r\n"
PROMPT = r"(?:^|\n)> "


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, made to speak until it is stopped: its end tokens are no longer known."""
    folder = Path(shutil.copytree(demo_model_folder(), tmp_path_factory.mktemp("endless") / "model"))
    for name in ("config.json", "generation_config.json"):
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**values, "eos_token_id": None}))
    return folder


def open_chat(folder: Path, max_new_tokens: int, *options: object) -> Terminal:
    args = ("chat", folder, "--ram", "4GiB", "--max-new-tokens", max_new_tokens, *options)
    return Terminal(command_line(*args), environment(TERM="dumb", PYTHONUNBUFFERED="1"))


def test_a_conversation(folder: Path) -> None:
    with open_chat(folder, 12) as terminal:
        opening = terminal.expect(PROMPT)
        assert "Ctrl-C stops a reply; /exit leaves." in opening
        assert "experts in RAM" in opening, "what goes where is said before the first prompt"

        terminal.send("hello\n")
        terminal.expect("hello\r\n")
        reply = terminal.expect(STATS)
        assert reply.splitlines()[-1].startswith("12 tokens, ")
        assert "".join(reply.splitlines()[:-1]).strip(), "the reply stands before its statistics"

        terminal.expect(PROMPT)
        terminal.send(CTRL_C)
        terminal.expect(PROMPT)
        terminal.send("half a line" + CTRL_C)
        terminal.expect(PROMPT)
        terminal.send("\n")
        terminal.expect(PROMPT)
        assert terminal.running, "neither Ctrl-C nor an empty line leaves"

        terminal.send("again\n")
        terminal.expect("again\r\n")
        second = terminal.expect(STATS)
        assert "for 9 prompt" not in second
        terminal.expect(PROMPT)
        terminal.send("/exit\n")
        assert terminal.wait() == 0
        assert "Traceback" not in terminal.shown and "\ufffd" not in terminal.shown


def test_ctrl_c_stops_the_reply_and_keeps_the_chat(folder: Path) -> None:
    with open_chat(folder, 1500, "--temperature", 1.0, "--seed", 1) as terminal:
        terminal.expect(PROMPT)
        for _ in range(2):
            terminal.send("hello\n")
            terminal.expect("hello\r\n")
            terminal.expect(r"\S")
            terminal.send(CTRL_C)
            terminal.expect(r"\[stopped\]\r\n")
            terminal.expect(PROMPT)
            assert terminal.running
        assert not [line for line in terminal.shown.splitlines() if "tok/s" in line], (
            "a stopped reply has no statistics"
        )
        terminal.send(CTRL_D)
        assert terminal.wait() == 0
        assert "Traceback" not in terminal.shown
