"""README and pages of the docs say what the code does."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from commands import invoke, succeed
from places import ROOT
from published import write_published

from offmoe.checkpoint.locate import demo_model_folder


@pytest.mark.skipif(
    f"transformers=={transformers.__version__}\n" not in (ROOT / "constraints.txt").read_text(encoding="utf-8"),
    reason="the table is made with the pinned transformers",
)
def test_models_table_is_current() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "scripts/models_table.py"), "--check"], check=False)
    assert done.returncode == 0, "run python scripts/models_table.py"


def examples(language: str) -> list[str]:
    """The code blocks of README and command-line page that a user may copy."""
    pages = (ROOT / "README.md", ROOT / "docs" / "command-line.md")
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("number", range(len(examples("python"))))
def test_python_examples_run(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the bundled model in the place of the one they name."""
    monkeypatch.chdir(tmp_path)
    code = examples("python")[number].replace("path/to/Qwen3-30B-A3B", str(demo_model_folder()))
    assert str(demo_model_folder()) in code
    exec(compile(code, f"example {number}", "exec"), {})


COMMANDS = [
    line.partition("#")[0].strip()
    for block in examples("sh")
    for line in block.splitlines()
    if re.match(r"offmoe (inspect|generate|chat +path|verify|bench)", line)
]


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_run(line: str) -> None:
    args = shlex.split(line)[1:]
    shorter = ["--max-new-tokens", "4"] if args[0] in {"chat", "verify"} else []
    args = [str(demo_model_folder()) if arg.startswith("path/to/") else arg for arg in args]
    result = invoke(*args, *shorter, stdin="hello\n")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(("page", "rows"), [("README.md", 9), ("docs/command-line.md", 9), ("docs/tuning.md", 11)])
def test_the_plan_that_is_shown_is_what_plan_says(page: str, rows: int, tmp_path: Path) -> None:
    """Line by line, but for the width of its columns."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    block = next(block for language, block in blocks if not language and "a token " in block)
    shown = [line.partition("(from:")[0].split() for line in block.splitlines() if not line.startswith(("...", "$"))]
    model = write_published("qwen3-30b-a3b", tmp_path / "model")
    said = [line.split() for line in succeed("plan", model, "--for", "laptop without GPU, 32 GB").stdout.splitlines()]
    assert len(shown) == rows
    assert [line for line in shown if line not in said] == []


def test_there_are_examples() -> None:
    assert len(examples("python")) >= 2 and {line.split()[1] for line in COMMANDS} >= {"inspect", "generate", "chat"}
