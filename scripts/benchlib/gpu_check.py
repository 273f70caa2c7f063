"""Learn the most from a few minutes with a CUDA GPU; `scripts/gpu_check` starts it.

    scripts/gpu_check                        # nine minutes: everything
    scripts/gpu_check --minutes 3            # what decides the design, copier, engine, one level; 6: kernels' tests too
    scripts/gpu_check --part first           # one part; --part list names them
    scripts/gpu_check --out /tmp/results     # four files: table, records, log, and the head of it
    scripts/gpu_check --simulate             # no GPU: tries the script itself at tiny sizes

Parts run in order of what they decide, each a process of its own with its own limit. A part that fails, hangs, crashes
or is refused memory does not stop the others, and the files are written anew after every part. The summary comes last.
Exit code 0: all passed. 1: something did not, see the table. 2: there is no CUDA device, or the options are wrong.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchlib.device_report import LEGEND, device_tables
from benchlib.gpu_parts import ROOT, SPOILT, Outcome, Part, plan_parts, run_part, spoil, tail
from benchlib.machine import describe_machine, describe_versions
from benchlib.report import without_folders

CHOICES_MINUTES = (3, 6, 9)
ASK_LIMIT_S = 180  # the first `import torch` of a cold image
RESERVE_S = 20.0  # of the whole: starting, writing, ending a part that is over its limit
RAM_DISK, MODEL_BYTES = Path("/dev/shm"), 8 << 30
SUMMARY_LINES = 60
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
    with tempfile.TemporaryDirectory(prefix="gpu-check-", dir=scratch_folder(), ignore_cleanup_errors=True) as scratch:
        try:
            parts = choose_parts(args, plan_parts(simulate=args.simulate, models=Path(scratch) / "models"))
        except ValueError as error:
            return _refuse(str(error))
        if args.part == "list":
            print("\n".join(f"{part.key:16} {part.title}, up to {part.limit_s:.0f} s" for part in parts))
            return 0
        facts = ask_device()
        if not args.simulate and not facts.get("available"):
            why = facts.get("error") or f"torch {facts['torch']} sees none"
            return _refuse(f"no CUDA device: {why}; --simulate tries this script without one")
        check = Check(args, facts)
        print("\n".join(check.about), flush=True)
        for part in parts:
            left_s = args.minutes * 60 - RESERVE_S - (time.monotonic() - begin)
            check.run(part, min(left_s if args.part else part.limit_s * (20 if args.simulate else 1), left_s),
                      Path(scratch) / f"{part.key}.json")  # fmt: skip
    print("\n".join(check.summary()[:SUMMARY_LINES]))
    print(f"wrote {check.result.name}, {check.records_file.name} and {check.log.name}, "
          f"{time.monotonic() - begin:.0f} s in all")  # fmt: skip
    return 1 if any(outcome.failure for outcome in check.outcomes) or not check.outcomes else 0


class Check:
    """The parts that have run, and the files that tell of them."""

    def __init__(self, args: argparse.Namespace, facts: dict[str, Any]) -> None:
        out = args.out.resolve()
        out.mkdir(parents=True, exist_ok=True)
        name = "simulated" if args.simulate else re.sub(r"[^a-z0-9]+", "-", str(facts["name"]).lower()).strip("-")
        self.result = free_name(out, f"{datetime.date.today().isoformat()}-gpu-{name}")
        self.records_file = self.result.with_suffix(".json")
        self.log = self.result.with_suffix(".log")
        self.about = describe(args, facts)
        self.outcomes: list[Outcome] = []
        self.records: list[dict[str, Any]] = []
        self._write()

    def run(self, part: Part, limit_s: float, partial: Path) -> None:
        """Run a part within its limit, keep what it recorded however it ended, write the files."""
        print(f"== {part.title} (up to {max(0.0, limit_s):.0f} s)", file=sys.stderr, flush=True)
        if limit_s < 1:
            outcome = Outcome(part=part, seconds=0.0, failure="no time was left", lines=())
        else:
            outcome = run_part(part, limit_s=limit_s, log=self.log, partial=partial)
        self.outcomes.append(outcome)
        self.records += [{"part": part.key, **record} for record in read_records(partial)]
        self._write()

    def _write(self) -> None:
        lines = [*self.about, *render(self.outcomes, self.records)]
        self.result.write_text("\n".join(lines) + "\n", encoding="utf-8")
        parts = [
            {"part": outcome.part.key, "seconds": round(outcome.seconds, 1), "failure": outcome.failure}
            for outcome in self.outcomes
        ]
        self.records_file.write_text(json.dumps({"parts": parts, "records": self.records}) + "\n", encoding="utf-8")

    def summary(self) -> list[str]:
        """The table, and the first part's figures; everything else is in the files."""
        return [*table(self.outcomes), *first_facts(self.records)]


def choose_parts(args: argparse.Namespace, parts: list[Part]) -> list[Part]:
    """The parts that were asked for. Raises ValueError with one line for the user."""
    known = {part.key: part for part in parts}
    spoilt = dict(item.split("=", 1) if "=" in item else (item, "") for item in args.spoil.split(",") if item)
    for name, how in spoilt.items():
        if name not in known or how not in SPOILT:
            raise ValueError(f"--spoil {name}={how}: use PART=HOW of {', '.join(known)} and {', '.join(SPOILT)}")
    parts = [spoil(part, spoilt[part.key]) if part.key in spoilt else part for part in parts]
    if args.part and args.part != "list":
        if args.part not in known:
            raise ValueError(f"--part {args.part!r} is no part; known: {', '.join(known)}")
        return [part for part in parts if part.key == args.part]
    return [part for part in parts if part.minutes <= args.minutes]


def scratch_folder() -> Path | None:
    """The RAM disk, where it has room for a model; its size can be that of a machine that has not shown its memory."""
    try:
        room = shutil.disk_usage(RAM_DISK).free
    except OSError:
        return None
    return RAM_DISK if room > MODEL_BYTES else None


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="scripts/gpu_check", description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--minutes", type=int, choices=CHOICES_MINUTES, default=9, help="for the whole (default: %(default)s)"
    )
    parser.add_argument("--part", default="", help="this one alone; `list` names them")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks", help="folder of the results (default: benchmarks)"
    )
    parser.add_argument("--simulate", action="store_true", help="every part at tiny size, without a GPU")
    parser.add_argument(
        "--spoil", default="", metavar="PART=HOW,...", help=f"a rehearsal: make a part {', '.join(SPOILT)}"
    )
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


def first_facts(records: Sequence[dict[str, Any]]) -> list[str]:
    """The records of the first part, a line each."""
    lines = []
    for record in records:
        if record["part"] == "first" and record["kind"] not in ("failure", "skipped"):
            facts = ", ".join(
                f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                for name, value in record.items() if name not in ("part", "kind") and value is not None
            )  # fmt: skip
            lines.append(f"- {record['kind']}: {facts}")
    return ["", *lines] if lines else []


def render(outcomes: Sequence[Outcome], records: Sequence[dict[str, Any]]) -> list[str]:
    """The result below its head."""
    lines = [*table(outcomes), *first_facts(records)]
    on_device = [record for record in records if record["part"].startswith("device")]
    if on_device:
        lines += ["", "## Whole models on the device", *device_tables(on_device), "", LEGEND]
    for outcome in outcomes:
        if outcome.failure or not outcome.part.records:
            lines += ["", f"## {outcome.part.title}", ""]
            lines.append(f"`{shlex.join(['python', *without_folders(outcome.part.command[1:])])}`")
            lines += ["", "```", *tail(outcome.lines, 40 if outcome.failure else 12), "```"]
    return lines


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # the result of the parts that ended is written
        sys.exit(130)
