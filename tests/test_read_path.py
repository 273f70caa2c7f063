"""The way of a token stays short enough to be read: scripts/read_path.py counts it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from cpu_cases import needs_library
from read_path import functions_of_a_token, num_lines

pytestmark = needs_library


# A newcomer reads it in an hour. It was 156 functions in 43 files.
@pytest.mark.parametrize(
    ("path", "functions", "files", "lines"), [("fused", 60, 16, 500), ("eager", 90, 26, 700)]
)  # fmt: skip
def test_a_token_is_few_functions(path: str, functions: int, files: int, lines: int) -> None:
    codes = functions_of_a_token(path)
    assert len(codes) <= functions, sorted(code.co_qualname for code in codes)
    assert len({code.co_filename for code in codes}) <= files
    assert sum(map(num_lines, codes)) <= lines


def test_the_readme_names_functions_that_run() -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    walk = readme[readme.index("In code, each hop") : readme.index("beside it `Lookahead`")]
    ran = {path: {code.co_qualname for code in functions_of_a_token(path)} for path in ("fused", "eager")}
    begin, *ways = (re.findall(r"`(\w+\.\w+|[a-z]+_\w+)`", part) for part in re.split(r"\n- ", walk))
    assert set(begin[1:]) <= ran["fused"] & ran["eager"] and begin[0] == "Engine.stream"
    for path, names in zip(("fused", "eager"), ways, strict=True):
        own = [name for name in names if name != "Executor.run_layer"]
        assert len(own) >= 2 and set(own) <= ran[path], path
    assert "Executor.run_layer" in ran["eager"]
    assert f"{len(ran['fused'])} in 16 files" in walk
