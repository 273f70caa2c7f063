"""The `offmoe` command, run in this process and in one of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from click.testing import CliRunner, Result
from patience import PATIENCE_S

from offmoe.cli.main import main

COMMANDS = (
    "bench", "chat", "demo", "generate", "inspect", "list", "plan", "pull", "quantize", "replay", "rm", "run", "serve",
    "show", "trace", "tune", "verify",
)  # fmt: skip
TIMEOUT_S = PATIENCE_S


def invoke(*args: object, stdin: str | bytes | None = None) -> Result:
    """In this process. What the command does not handle is raised here."""
    return CliRunner().invoke(main, [str(arg) for arg in args], input=stdin, catch_exceptions=False, prog_name="offmoe")


def succeed(*args: object, stdin: str | bytes | None = None) -> Result:
    result = invoke(*args, stdin=stdin)
    assert result.exit_code == 0, result.output
    return result


def last_json(text: str) -> Any:
    """The last line of standard output, which must be one JSON object."""
    record = json.loads(text.splitlines()[-1])
    assert isinstance(record, dict)
    return record


def fail(*args: object, stdin: str | bytes | None = None) -> str:
    """The command fails as every command fails: exit code 2, nothing on stdout, one `error: ...` line at the end."""
    result = invoke(*args, stdin=stdin)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    lines = result.stderr.splitlines()
    assert [line.startswith("error: ") for line in lines] == [False] * (len(lines) - 1) + [True], result.stderr
    assert lines[-1].isprintable()
    return lines[-1].removeprefix("error: ")


def command_line(*args: object) -> list[str]:
    return [sys.executable, "-m", "offmoe", *map(str, args)]


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **changes}


def run(*args: object, stdin: str = "", **changes: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own."""
    return subprocess.run(
        command_line(*args), input=stdin, capture_output=True, text=True, timeout=TIMEOUT_S, env=environment(**changes),
        check=False,
    )  # fmt: skip
