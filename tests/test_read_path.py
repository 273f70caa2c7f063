"""The way of a token stays short enough to be read: scripts/read_path.py counts it."""

from __future__ import annotations

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
