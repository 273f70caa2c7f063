"""`offmoe` in terminals and pipes without seconds of imports: a process that imported everything forks for each run.

It starts no thread before it forks. The runs are those of `python -m offmoe`, but that a script may be given that the
model says: the parts of a text between lines of ===, over and over, one token every so many milliseconds.
"""

from __future__ import annotations

import itertools
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, cast

from commands import environment
from patience import PATIENCE_S
from places import python_path
from terminal import Screened

from offmoe.report import progress

HERE = Path(__file__).resolve().parent


class WarmChat:
    """Starts runs. Use as a context manager."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "warm_chat.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=environment(PYTHONPATH=python_path()),
        )  # fmt: skip

    def start(self, request: dict[str, Any]) -> int:
        """The run's process id."""
        self._write(request)
        return self._read()

    def wait(self, pid: int) -> int:
        """The run's exit code. Raises AssertionError when it does not end."""
        self._write({"wait": pid})
        return self._read()

    def _write(self, request: dict[str, Any]) -> None:
        stdin = cast("IO[str]", self._process.stdin)
        stdin.write(json.dumps(request) + "\n")
        stdin.flush()

    def _read(self) -> int:
        stdout = cast("IO[str]", self._process.stdout)
        ready, _, _ = select.select([stdout], [], [], PATIENCE_S)
        assert ready, "the run does not end"
        return int(stdout.readline())

    def __enter__(self) -> WarmChat:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()


class WarmTerminal(Screened):
    """A run in a terminal of its own. `stdin`, a file, takes the place of the keyboard."""

    def __init__(
        self, warm: WarmChat, args: Sequence[object], *, columns: int = 200, rows: int = 24, said: str | None = None,
        pause_ms: float = 0, stdin: Path | None = None, slow_prompt: bool = False, **env: str,
    ) -> None:  # fmt: skip
        """`slow_prompt`: the layers of a prompt take 10 ms more each, and progress is shown from the first one on."""
        keyboard, screen = os.openpty()
        super().__init__(keyboard, columns, rows)
        self._warm = warm
        self._pid = warm.start({
            "args": [str(arg) for arg in args], "tty": os.ttyname(screen), "said": said, "pause_s": pause_ms / 1000,
            "stdin": str(stdin) if stdin else None, "slow_prompt": slow_prompt,
            "env": {"TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1", **env},
        })  # fmt: skip
        os.close(screen)

    def wait(self) -> int:
        """The exit code, once everything was shown."""
        self.drain()
        return self._warm.wait(self._pid)

    @property
    def running(self) -> bool:
        return Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")[2].split()[0] not in {"Z", "X"}


def run_piped(warm: WarmChat, folder: Path, stdin: str, args: Sequence[object], said: str) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of a run without a terminal."""
    (folder / "stdin").write_text(stdin, encoding="utf-8")
    pid = warm.start({
        "args": [str(arg) for arg in args], "tty": None, "said": said, "pause_s": 0.0, "stdin": str(folder / "stdin"),
        "stdout": str(folder / "stdout"), "stderr": str(folder / "stderr"), "slow_prompt": False, "env": {},
    })  # fmt: skip
    code = warm.wait(pid)
    return code, (folder / "stdout").read_text(encoding="utf-8"), (folder / "stderr").read_text(encoding="utf-8")


def _serve() -> None:
    import prompt_toolkit
    import rich.markdown
    import rich.progress
    import rich.syntax
    import torch

    import offmoe.cli.chat.loop
    import offmoe.engine.engine  # noqa: F401

    torch.set_num_threads(1)
    del prompt_toolkit, rich
    sys.stdout.write("")
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            answer = os.waitstatus_to_exitcode(status)
        else:
            tty = os.open(request["tty"], os.O_RDWR | os.O_NOCTTY) if request["tty"] else None
            answer = os.fork()
            if answer == 0:
                _run(request, tty)
            if tty is not None:  # held until the run has it: a terminal that nobody holds is at its end
                os.close(tty)
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()


def _run(request: dict[str, Any], tty: int | None) -> None:
    """In the child: never returns."""
    import fcntl
    import termios

    os.setsid()
    code = 1
    try:
        if tty is not None:
            fcntl.ioctl(tty, termios.TIOCSCTTY, 0)
            opened = [tty, tty, tty]
        else:
            opened = [
                0,
                *(os.open(request[name], os.O_CREAT | os.O_TRUNC | os.O_WRONLY) for name in ("stdout", "stderr")),
            ]
        if request["stdin"]:
            opened[0] = os.open(request["stdin"], os.O_RDONLY)
        for number, file in enumerate(opened):
            os.dup2(file, number)
        sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, mode, buffering=1) for n, mode in enumerate("rww"))
        sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr  # type: ignore[misc]
        os.environ.pop("NO_COLOR", None)
        os.environ.update(request["env"])
        sys.argv[1:] = request["args"]
        if request["said"] is not None:
            _say(request["said"], request["pause_s"])
        if request["slow_prompt"]:
            _read_slowly()
        from offmoe.cli.main import main

        main(prog_name="offmoe")
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(bool(leaving.code))
    except BaseException:  # noqa: BLE001 - the child must not become a second test run
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _read_slowly() -> None:
    from offmoe.cli.session import PromptProgress

    progress.SHOW_AFTER_S = 0.0
    show = PromptProgress.show

    def show_slowly(self: PromptProgress, done: int, total: int) -> None:
        show(self, done, total)
        time.sleep(0.01)

    PromptProgress.show = show_slowly  # type: ignore[method-assign]


def _say(text: str, pause_s: float) -> None:
    """Every chooser made from now on says the next part of `text`."""
    import torch
    from transformers import AutoTokenizer

    from offmoe.checkpoint.locate import demo_model_folder
    from offmoe.engine import request
    from offmoe.sampling.params import Chooser, SamplingParams

    parts = itertools.cycle(text.split("\n===\n"))
    tokenizer = AutoTokenizer.from_pretrained(demo_model_folder())
    end_id = int(tokenizer.convert_tokens_to_ids("<|end|>"))

    def make_chooser(sampling: SamplingParams, device: torch.device, rules: object, **_: object) -> Chooser:
        ids: Iterator[int] | None = None

        def choose(given: torch.Tensor, logits: torch.Tensor) -> int:
            nonlocal ids
            if ids is None:
                ids = iter([*tokenizer(next(parts))["input_ids"], end_id])
            time.sleep(pause_s)
            return next(ids)

        return choose

    request.make_chooser = make_chooser


if __name__ == "__main__":
    _serve()
