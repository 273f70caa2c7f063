"""What scripts/gpu_check runs: each part a process of its own, ended with its children when it takes too long."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
KILL_AFTER_S = 5.0
LONGEST_LINE = 300  # of what is shown while it runs; JSON lines are longer


@dataclass(frozen=True, kw_only=True)
class Part:
    """A command. `limit_s` is what it may take; `spare` parts get what the parts before have left over."""

    key: str
    title: str
    command: tuple[str, ...]
    limit_s: float
    spare: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a part ended. `failure` is empty when it passed."""

    part: Part
    seconds: float
    failure: str
    lines: tuple[str, ...]

    @property
    def last_line(self) -> str:
        """What it said last, JSON aside."""
        return next((line for line in reversed(self.lines) if line.strip() and not line.startswith("{")), "")


def plan_parts(*, total_s: float, simulate: bool, partial: Path, device_args: tuple[str, ...] = ()) -> list[Part]:
    """All parts in order; the benchmark on the device comes last and gets what the others leave.

    Of nine minutes: tests 110 s, verify 3 x 40 s, kernels 110 s, device 180 s or more. Simulated, each may take all.
    """

    def part(key: str, title: str, seconds: float, *command: str, **options: Any) -> Part:
        limit_s = total_s if simulate else seconds * total_s / 520
        if simulate:  # tiny matrices: threads would wait for each other
            options["environment"] = {"OMP_NUM_THREADS": "1", **options.get("environment", {})}
        return Part(key=key, title=title, command=(sys.executable, *command), limit_s=limit_s, **options)

    tests = ["-m", "pytest", "tests/gpu", "-m", "gpu", "-rfE", "-p", "no:cacheprovider"]
    # Plugins that happen to be installed warn, and warnings are errors; the settings file names this one.
    tests += ["-p", "pytest_timeout"]
    environment = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    if simulate:
        tests += ["-k", "not compiled"]
        environment["OFFMOE_SIMULATE"] = "1"
    device = ["scripts/bench_device.py", "--partial", str(partial)]
    return [
        part("tests", "tests that need a GPU", 110, *tests, environment=environment),
        *(
            part("verify", f"verify {' '.join(options)}", 40, "-m", "offmoe", "verify", "--ram", "4GiB",
                 "--max-new-tokens", "4" if simulate else "24", *options)
            for options in ([("--device", "cpu")] if simulate else VERIFY)
        ),
        part("kernels", "kernels, each alone", 110, "scripts/bench_triton.py", *(["--simulate"] if simulate else [])),
        part("device", "whole models on the device", 180, *device, *(TINY if simulate else []), *device_args,
             spare=True),
    ]  # fmt: skip


TINY = ("--simulate", "--models", "qwen3-30b-a3b", "--shares", "25,100")
VERIFY = (
    ("--device", "cuda", "--vram", "4GiB"),
    ("--device", "cuda", "--vram", "1GiB", "--placement-invariant"),
    ("--device", "cuda", "--vram", "1GiB", "--miss", "stream"),
)


def run_part(part: Part, *, limit_s: float) -> Outcome:
    """Run it, show its lines as they come, end it at its limit. Never raises for what the part does."""
    command = list(part.command)
    if part.key == "device":
        command += ["--seconds", f"{limit_s - 15:.0f}"]  # so that it ends by itself
    script = next((Path(word) for word in command if word.startswith("scripts/")), None)
    if script is not None and not (ROOT / script).is_file():
        return Outcome(part=part, seconds=0.0, failure=f"there is no {script}", lines=())
    environment = {
        **os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1",
        "TOKENIZERS_PARALLELISM": "false", **part.environment,
    }  # fmt: skip
    begin = time.monotonic()
    lines: list[str] = []
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace", start_new_session=True,
    ) as process:  # fmt: skip
        reader = threading.Thread(target=_read, args=(process, lines), daemon=True)
        reader.start()
        try:
            failure = _wait(process, limit_s)
        finally:
            _end(process)
        reader.join(KILL_AFTER_S)
    return Outcome(part=part, seconds=time.monotonic() - begin, failure=failure, lines=tuple(lines))


def _read(process: subprocess.Popen[str], lines: list[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line.rstrip("\n").replace(str(ROOT), "."))
        if len(line) <= LONGEST_LINE:
            print(f"  {lines[-1]}", file=sys.stderr, flush=True)


def _wait(process: subprocess.Popen[str], limit_s: float) -> str:
    try:
        code = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return f"ended at its limit of {limit_s:.0f} s"
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    return f"exit code {code}" if code else ""


def _end(process: subprocess.Popen[str]) -> None:
    """The part's own process group, which it began: first asked, then ended."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(KILL_AFTER_S)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def tail(lines: Sequence[str], count: int) -> list[str]:
    """The last lines that people read: no JSON."""
    return [line for line in lines if len(line) <= LONGEST_LINE][-count:]
