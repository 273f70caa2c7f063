"""Run everything that needs a CUDA GPU and write one result file; `scripts/gpu_check` starts it.

    scripts/gpu_check                        # under nine minutes; benchmarks/DATE-gpu-NAME.md
    scripts/gpu_check --only tests,verify    # some parts: tests, verify, kernels, device
    scripts/gpu_check --only device --device-args "--shares 10,50"
    scripts/gpu_check --out /tmp/results --minutes 5
    scripts/gpu_check --simulate             # no GPU: tries the script itself at tiny sizes

A part that fails or takes too long does not stop the others; the result file is written anew after every part. Exit
code 0: all passed. 1: something did not, see the table. 2: there is no CUDA device, or the options are wrong.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchlib.device_report import LEGEND, device_tables
from benchlib.gpu_parts import ROOT, Outcome, plan_parts, run_part, tail
from benchlib.machine import describe_machine, describe_versions
from benchlib.report import without_folders

TOTAL_MINUTES = 9.0
ASK_LIMIT_S = 60
RESERVE_S = 20.0  # of the whole: starting, writing, ending a part that is over its limit
KINDS = ("tests", "verify", "kernels", "device")
# In a process of its own, so that this one holds nothing on the device while the parts run.
ASK = """
import json, torch
facts = {"torch": torch.__version__, "cuda": torch.version.cuda, "available": torch.cuda.is_available()}
if facts["available"]:
    properties = torch.cuda.get_device_properties(0)
    facts |= {"name": properties.name, "memory": properties.total_memory,
              "capability": f"{properties.major}.{properties.minor}",
              "multiprocessors": properties.multi_processor_count}
try:
    import triton
    facts["triton"] = triton.__version__
except ImportError:
    facts["triton"] = "absent"
print(json.dumps(facts))
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit code."""
    args = parse_args(argv)
    begin = time.monotonic()
    unknown = [kind for kind in args.only.split(",") if kind not in KINDS]
    if unknown:
        return _refuse(f"--only {unknown[0]!r} is no part; known: {', '.join(KINDS)}")
    facts = ask_device()
    if not args.simulate and not facts.get("available"):
        why = facts.get("error") or f"torch {facts['torch']} sees none"
        return _refuse(f"no CUDA device: {why}; --simulate tries this script without one")
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    name = "simulated" if args.simulate else re.sub(r"[^a-z0-9]+", "-", str(facts["name"]).lower()).strip("-")
    result = free_name(out, f"{datetime.date.today().isoformat()}-gpu-{name}")
    partial = result.with_name(f"{result.stem}-device.json")
    partial.unlink(missing_ok=True)
    about = describe(args, facts)
    print("\n".join(about), flush=True)
    total_s = args.minutes * 60 - RESERVE_S
    outcomes: list[Outcome] = []
    device_args = tuple(shlex.split(args.device_args))
    for part in plan_parts(total_s=total_s, simulate=args.simulate, partial=partial, device_args=device_args):
        if part.key not in args.only.split(","):
            continue
        left_s = total_s - (time.monotonic() - begin)
        limit_s = left_s if part.spare else min(part.limit_s, left_s)
        print(f"== {part.title} (up to {max(0.0, limit_s):.0f} s)", file=sys.stderr, flush=True)
        if limit_s < 1:
            outcomes.append(Outcome(part=part, seconds=0.0, failure="no time was left", lines=()))
        else:
            outcomes.append(run_part(part, limit_s=limit_s))
        result.write_text("\n".join([*about, *render(outcomes, read_records(partial))]) + "\n", encoding="utf-8")
    print("\n".join(table(outcomes)))
    print(f"wrote {result.name}, {time.monotonic() - begin:.0f} s in all")
    return 1 if any(outcome.failure for outcome in outcomes) or not outcomes else 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="scripts/gpu_check", description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=TOTAL_MINUTES, help="for the whole (default: %(default)g)")
    parser.add_argument("--only", default=",".join(KINDS), help="parts, comma-separated (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks", help="folder of the result (default: benchmarks)"
    )
    parser.add_argument("--device-args", default="", help="further options of scripts/bench_device.py")
    parser.add_argument("--simulate", action="store_true", help="every part at tiny size, without a GPU")
    return parser.parse_args(argv)


def free_name(out: Path, stem: str) -> Path:
    """`stem`.md, or with a number behind it: several runs of a day do not overwrite each other."""
    number = 1
    while (path := out / (f"{stem}.md" if number == 1 else f"{stem}-{number}.md")).exists():
        number += 1
    return path


def _refuse(line: str) -> int:
    print(f"error: {line}", file=sys.stderr)
    return 2


def ask_device() -> dict[str, Any]:
    """What torch sees, or why it cannot be asked."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", ASK], capture_output=True, text=True, timeout=ASK_LIMIT_S, check=False
        )
        facts: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {"error": f"torch did not answer within {ASK_LIMIT_S} s"}
    except (IndexError, json.JSONDecodeError):
        return {"error": " ".join(done.stderr.split()[-12:]) or "torch did not answer"}
    return facts


def driver_version() -> str:
    """As nvidia-smi tells it."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def describe(args: argparse.Namespace, facts: dict[str, Any]) -> list[str]:
    """The head of the result: when, command, machine, versions."""
    machine = ", ".join(f"{key} {value}" for key, value in describe_machine().items())
    versions = describe_versions(ROOT) | {"cuda": facts.get("cuda"), "triton": facts.get("triton")}
    device = "simulated, in RAM"
    if not args.simulate:
        device = (
            f"{facts['name']}, {facts['memory'] / 2**30:.1f} GiB, compute capability {facts['capability']}, "
            f"{facts['multiprocessors']} multiprocessors, driver {driver_version()}"
        )
    command = ["scripts/gpu_check", *without_folders(sys.argv[1:])]
    return [
        f"# GPU check{' (simulated: no figure here means anything)' if args.simulate else ''}, "
        f"{datetime.date.today().isoformat()}",
        "",
        f"- command: `{shlex.join(command)}`",
        f"- device: {device}",
        f"- machine: {machine}",
        f"- versions: {', '.join(f'{key} {value}' for key, value in versions.items())}",
    ]


def read_records(partial: Path) -> list[dict[str, Any]]:
    """What the benchmark on the device had measured when it ended, however it ended."""
    try:
        records: list[dict[str, Any]] = json.loads(partial.read_text(encoding="utf-8"))["records"]
    except (OSError, json.JSONDecodeError):
        return []
    return records


def table(outcomes: Sequence[Outcome]) -> list[str]:
    """One row a part."""
    lines = ["", "| part | result | seconds | last words |", "|---|---|---|---|"]
    for outcome in outcomes:
        words = outcome.last_line.strip("= ").replace("|", "/")[:120]
        lines.append(f"| {outcome.part.title} | {outcome.failure or 'passed'} | {outcome.seconds:.0f} | {words} |")
    return lines


def render(outcomes: Sequence[Outcome], records: Sequence[dict[str, Any]]) -> list[str]:
    """The result below its head."""
    lines = table(outcomes)
    for outcome in outcomes:
        lines += ["", f"## {outcome.part.title}", ""]
        lines.append(f"`{shlex.join(['python', *without_folders(outcome.part.command[1:])])}`")
        if outcome.part.key == "device":
            lines += ["", *device_tables(records), "", LEGEND]
        if outcome.failure or outcome.part.key != "device":
            lines += ["", "```", *tail(outcome.lines, 60), "```"]
    return lines


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # the result of the parts that ended is written
        sys.exit(130)
