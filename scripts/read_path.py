"""Count what a reader reads to follow one token: the functions of offmoe that run, their files and their lines.

    python scripts/read_path.py                 # the bundled model, on the fused path and by transformers' modules

Two tokens are decoded after some that warm up, whose experts are all in RAM, and each function of the package that is
called between asking `engine.stream` for the next piece and receiving it is noted once. Lines are those of the
functions' source, docstrings and blank lines left out. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import json
import os
import sys
from pathlib import Path
from types import CodeType, FrameType
from unittest import mock

import offmoe

PACKAGE = Path(offmoe.__file__).parent
NUM_WARM, NUM_COUNTED = 12, 2


def functions_of_a_token(system: str) -> set[CodeType]:
    """The package's functions that run for a token of the bundled model; `system` is a decode path."""
    seen: set[CodeType] = set()

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(str(PACKAGE)):
            seen.add(frame.f_code)

    with (
        mock.patch.dict(os.environ, {"OFFMOE_DECODE": system}),
        offmoe.load(device="cpu", compile="off", prefetch="off", pack="off") as engine,
    ):
        ids, most = [5, 6, 7, 8], NUM_WARM + NUM_COUNTED + 1
        engine.generate(ids, max_new_tokens=most, ignore_eos=True, temperature=0)
        pieces = engine.stream(ids, max_new_tokens=most, ignore_eos=True, temperature=0)  # its experts are in RAM now
        list(itertools.islice(pieces, NUM_WARM))
        sys.setprofile(note)
        try:
            list(itertools.islice(pieces, NUM_COUNTED))
        finally:
            sys.setprofile(None)
        assert engine.stats()["decode_path"] == system, engine.stats()["decode_path_reason"]
        list(pieces)
    return {code for code in seen if not code.co_name.startswith("<")}


def num_lines(code: CodeType) -> int:
    """Lines of the function that hold code."""
    tree = ast.parse(Path(code.co_filename).read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    found = next(
        node for node in ast.walk(tree) if isinstance(node, kinds) and node.name == code.co_name
        and min([node.lineno, *(item.lineno for item in node.decorator_list)]) == code.co_firstlineno
    )  # fmt: skip
    body = found.body[1:] if ast.get_docstring(found) and len(found.body) > 1 else found.body
    parts = [part for node in body for part in ast.walk(node) if isinstance(part, (ast.stmt, ast.expr))]
    lines = {line for part in parts for line in range(part.lineno, (part.end_lineno or part.lineno) + 1)}
    return 1 + len(lines)


def main() -> int:
    """Command line entry; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", action="store_true", help="list the functions too")
    args = parser.parse_args()
    found = {}
    for system in ("fused", "eager"):
        codes = sorted(functions_of_a_token(system), key=lambda code: (code.co_filename, code.co_firstlineno))
        files = {code.co_filename for code in codes}
        found[system] = {"functions": len(codes), "files": len(files), "lines": sum(map(num_lines, codes))}
        if args.names:
            for code in codes:
                print(f"{system}: {Path(code.co_filename).relative_to(PACKAGE)}: {code.co_qualname} {num_lines(code)}")
    python = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in PACKAGE.rglob("*.py"))
    print(json.dumps({"bench": "read path", **found, "package_lines": python}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
