"""Fuzz some targets, or all, one after another: `scripts/fuzz --minutes 10`, `scripts/fuzz gguf --minutes 2 --seed 7`.

A worker process varies the committed seeds and every input that took a new way through the code. An input that breaks
the rule (`rule.py`) is written, once for each way of breaking it, to the folder of findings; so is one that ends the
worker. The last line on stdout is one JSON object. Exit code 1: something was found.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import hashlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fuzzing.rule import MOST_CPU_S, try_input
from fuzzing.targets import TARGETS, Target
from offmoe.core.errors import OffmoeError

# Beyond any bound on processor time: native code that does not come back, on a machine that is busy with other things.
_STUCK_S = 60 * MOST_CPU_S
_MOST_CORPUS = 2000
_MOST_INPUT_BYTES = 1 << 20


def main() -> int:
    """Run what the command line says."""
    parser = argparse.ArgumentParser(prog="scripts/fuzz", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("targets", nargs="*", help=f"of {', '.join(TARGETS)}; default: all")
    parser.add_argument("--minutes", type=float, default=1.0, help="a target (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="names the choices that are made (default 0)")
    parser.add_argument("--findings", type=Path, default=Path(".fuzz"), help="folder for findings (default .fuzz)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    unknown = set(options.targets) - TARGETS.keys()
    if unknown:
        parser.error(f"no target {min(unknown)!r}; there are {', '.join(TARGETS)}")
    if options.worker:
        return _work(TARGETS[options.targets[0]], options)
    records = [_run(name, options) for name in options.targets or TARGETS]
    total = {key: sum(record[key] for record in records) for key in ("executions", "minutes", "found")}
    print(json.dumps({"seed": options.seed, **total, "targets": records}))
    return 1 if total["found"] else 0


def _run(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Workers, one after another until the time is over: each goes on after the input that ended the one before."""
    findings = options.findings / name
    findings.mkdir(parents=True, exist_ok=True)
    end, seed, executions, ways, died, cpu_s = time.monotonic() + 60 * options.minutes, options.seed, 0, 0, 0, 0.0
    while (left := end - time.monotonic()) > 0:
        command = [
            sys.executable,
            "-m",
            "fuzzing.run",
            name,
            "--worker",
            "--seed",
            str(seed),
            "--findings",
            str(findings),
        ]
        worker = subprocess.run([*command, "--minutes", str(left / 60)], stdout=subprocess.PIPE, check=False)
        report = json.loads(worker.stdout.splitlines()[-1]) if worker.returncode == 0 else {}
        executions, ways = executions + report.get("executions", 0), max(ways, report.get("ways", 0))
        cpu_s += report.get("cpu_s", 0.0)
        if not report:
            died, seed = died + 1, seed + 1
            shutil.copy(findings / "current", findings / f"ended-{worker.returncode}-{died}")
    (findings / "current").unlink(missing_ok=True)
    found = len([path for path in findings.iterdir() if path.suffix != ".txt"])
    record = {
        "target": name, "executions": executions, "minutes": options.minutes, "cpu_s": round(cpu_s, 1), "ways": ways,
        "found": found,
    }  # fmt: skip
    print(
        f"{name}: {executions} executions in {cpu_s:.0f} s of processor time, {ways} ways, {found} found",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    return record


def _work(target: Target, options: argparse.Namespace) -> int:
    rng = random.Random(f"{options.seed} {target.name}")
    corpus = [path.read_bytes() for path in target.seeds()]
    waiting = list(corpus)
    signatures: set[str] = set()
    broken: set[str] = set()
    _warm_up(target)
    executions, end, begin_s = 0, time.monotonic() + 60 * options.minutes, time.process_time()
    with tempfile.TemporaryDirectory() as place:
        while time.monotonic() < end:
            data = waiting.pop() if waiting else target.mutate(rng.choice(corpus), rng, corpus)[:_MOST_INPUT_BYTES]
            (options.findings / "current").write_bytes(data)
            folder = Path(place, "input")
            folder.mkdir()
            faulthandler.dump_traceback_later(_STUCK_S, exit=True)
            outcome = try_input(target.read, data, folder)
            faulthandler.cancel_dump_traceback_later()
            shutil.rmtree(folder)
            executions += 1
            if outcome.broken is not None and outcome.broken not in broken:
                broken.add(outcome.broken)
                path = options.findings / hashlib.sha256(outcome.broken.encode()).hexdigest()[:12]
                path.write_bytes(data)
                path.with_suffix(".txt").write_text(f"{outcome.broken}\n{outcome.details}", errors="replace")
            if outcome.signature not in signatures:
                signatures.add(outcome.signature)
                if len(corpus) < _MOST_CORPUS:
                    corpus.append(data)
    # On a busy machine processor time says more than minutes.
    print(json.dumps({"executions": executions, "ways": len(signatures), "cpu_s": time.process_time() - begin_s}))
    return 0


def _warm_up(target: Target) -> None:
    """Imports are made now: they are no input's time and memory."""
    for path in target.seeds():
        with tempfile.TemporaryDirectory() as folder, contextlib.suppress(OffmoeError):
            target.read(path.read_bytes(), Path(folder))


if __name__ == "__main__":
    sys.exit(main())
