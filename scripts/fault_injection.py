"""Fails every single call that operations make to the system, one a run, and counts what came of it.

Operations and the judgement of outcomes: tests/faults/fault_operations.py. Rows go to stderr as they are made; the last
line of stdout is the result as JSON. The exit code is 1 when an outcome was wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import benchlib.test_helpers  # noqa: F401
import torch
from engines import save_speaking, save_tiny
from families import build, save_layout
from fault_operations import OPERATIONS, Case
from faults import COPIES, SEAMS

WIDTHS: dict[str, object] = {"hidden_size": 64, "moe_intermediate_size": 32, "intermediate_size": 96}

# A device that is lost closes the engine, which these expect.
ON_DEVICE = ("load", "generate")


def make_model(name: str, folder: Path) -> Path:
    """The model that an operation works on."""
    if name in {"chat", "save"}:
        return save_speaking(folder)
    if name == "quantize":
        folder.mkdir()
        save_layout(build("qwen3_moe", overrides=WIDTHS), folder, "published")
        return folder
    return save_tiny(folder)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--operations", nargs="+", default=list(OPERATIONS), choices=list(OPERATIONS))
    parser.add_argument("--seams", nargs="+", default=[seam.name for seam in SEAMS])
    parser.add_argument("--stride", type=int, default=1, help="fail every so-manieth call only")
    parser.add_argument("--lasting", action="store_true", help="all calls from the n-th on fail")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name in args.operations:
        for seam in (seam for seam in SEAMS if seam.name in args.seams and (seam is not COPIES or name in ON_DEVICE)):
            root, begin = Path(tempfile.mkdtemp()), time.monotonic()
            os.environ["XDG_CACHE_HOME"] = str(root / "cache")
            case = Case(model=make_model(name, root / "model"), work=root / "work", on_device=seam is COPIES)
            case.work.mkdir()
            tally = OPERATIONS[name](case, seam, stride=args.stride, lasting=args.lasting)
            rows.append({
                "operation": name, "seam": seam.name, "failed": tally.failed, "absorbed": tally.absorbed,
                "refused": tally.refused, "wrong": tally.wrong, "seconds": round(time.monotonic() - begin, 1),
            })  # fmt: skip
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
            shutil.rmtree(root)
    wrong = sum(len(row["wrong"]) for row in rows)
    print(json.dumps({"failed": sum(row["failed"] for row in rows), "wrong": wrong, "rows": rows}))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
