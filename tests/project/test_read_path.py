"""The way of a token stays short enough to be read: scripts/read_path.py counts it, in a process of its own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import pytest
from cpu_cases import needs_library
from patience import PATIENCE_S
from places import ROOT

pytestmark = needs_library


@pytest.fixture(scope="module")
def counted() -> tuple[dict[str, Any], dict[str, set[str]]]:
    """The script's figures, and the names of the functions by path."""
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/read_path.py", "--names"], capture_output=True, text=True, check=False,
        timeout=PATIENCE_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    names = {path: {line.split()[2] for line in lines if line.startswith(f"{path}: ")} for path in ("fused", "eager")}
    return json.loads(last), names


# A newcomer reads it in an hour. It was 156 functions in 43 files.
@pytest.mark.parametrize(
    ("path", "functions", "files", "lines"), [("fused", 60, 17, 500), ("eager", 90, 26, 700)]
)  # fmt: skip
def test_a_token_is_few_functions(
    counted: tuple[dict[str, Any], dict[str, set[str]]], path: str, functions: int, files: int, lines: int
) -> None:
    figures = counted[0][path]
    assert 20 < len(counted[1][path]) == figures["functions"] <= functions, sorted(counted[1][path])
    assert figures["files"] <= files
    assert figures["lines"] <= lines


def test_the_walk_names_functions_that_run(counted: tuple[dict[str, Any], dict[str, set[str]]]) -> None:
    page, ran = (ROOT / "docs" / "internals.md").read_text(encoding="utf-8"), counted[1]
    walk = page[page.index("In code, each hop") : page.index("beside it `Lookahead`")]
    begin, *ways = (re.findall(r"`(\w+\.\w+|[a-z]+_\w+)`", part) for part in re.split(r"\n- ", walk))
    assert set(begin[1:]) <= ran["fused"] & ran["eager"] and begin[0] == "Engine.stream"
    for path, names in zip(("fused", "eager"), ways, strict=True):
        own = [name for name in names if name != "Executor.run_layer"]
        assert len(own) >= 2 and set(own) <= ran[path], path
    assert "Executor.run_layer" in ran["eager"]
    assert f"{counted[0]['fused']['functions']} in {counted[0]['fused']['files']} files" in walk
