"""The parts of scripts/gpu_check: each a process of its own with a limit, a log, and a record written as it goes.

A part that is over its limit is ended by SIGABRT first: with PYTHONFAULTHANDLER set, every thread's traceback then goes
to its log. Its children are of its process group and end with it.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
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
RESERVE_S = 8.0  # a script that measures is told to begin nothing in the last seconds of its limit
XDIST_PROCESSES = 12


@dataclass(frozen=True, kw_only=True)
class Part:
    """A command. `records`: it takes `--partial FILE` and `--seconds N`. `minutes`: the shortest check that has it."""

    key: str
    title: str
    command: tuple[str, ...]
    limit_s: float
    minutes: int = 3
    records: bool = False
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
        """The last line that people read: no JSON."""
        return next((line for line in reversed(self.lines) if line.strip() and not line.startswith("{")), "")


BENCH = ("-m", "benchlib.command_line")


def plan_parts(*, simulate: bool, models: Path) -> list[Part]:
    """All parts in order of what they decide. `models`: a folder for checkpoints, shared by the parts.

    Limits are what a part may take of nine minutes; what one leaves is there for those behind it.
    """
    here = sys.executable
    tiny = ("--simulate",) if simulate else ()
    where = ("--device", "cpu") if simulate else ("--device", "cuda", "--vram", "1GiB")

    def tests(key: str, title: str, limit_s: float, minutes: int, *arguments: str, **more: Any) -> Part:
        # Plugins that happen to be installed warn, and warnings are errors; the settings file names this one.
        command = (here, "-X", "faulthandler", "-m", "pytest", "-m", "gpu", "-v", "-rfE", "--tb=short",
                   "-p", "no:cacheprovider", "-p", "pytest_timeout",
                   "--timeout", "120" if simulate else "40", *arguments)  # fmt: skip
        environment = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", **({"OFFMOE_SIMULATE": "1"} if simulate else {})}
        return Part(key=key, title=title, command=command, limit_s=limit_s, minutes=minutes, environment=environment,
                    **more)  # fmt: skip

    def device(key: str, title: str, limit_s: float, minutes: int, *arguments: str) -> Part:
        command = (here, "-X", "faulthandler", *BENCH, "device", *tiny, "--models", "qwen3-30b-a3b",
                   "--layers", "2" if simulate else "4", "--keep", str(models), *arguments)  # fmt: skip
        return Part(key=key, title=title, command=command, limit_s=limit_s, minutes=minutes, records=True)

    in_parallel = () if simulate or importlib.util.find_spec("xdist") is None else (
        "-p", "xdist.plugin", "-n", str(XDIST_PROCESSES)
    )  # fmt: skip
    return [
        *([build_part()] if shutil.which("c++") or shutil.which("g++") else []),
        Part(key="first", title="what decides the design", limit_s=70, records=True,
             command=(here, "-X", "faulthandler", "scripts/gpu_first.py", *tiny)),
        tests("copier", "tests of the copier", 30, 3, "tests/gpu/test_cuda_copier.py"),
        tests("engine", "tests of the engine", 70, 3, "tests/gpu/test_engine_on_gpu.py"),
        device("device-25", "a quarter of the experts on the device", 60, 3, "--shares", "25", "--settings", "auto"),
        tests("slots", "tests of the slot kernels", 75, 6, "tests/gpu/test_slots_on_gpu.py", *in_parallel),
        Part(key="verify", title="verify, not compiled", limit_s=45, minutes=6,
             command=(here, "-X", "faulthandler", "-m", "offmoe", "verify", "--ram", "4GiB", "--compile", "off",
                      "--max-new-tokens", "4" if simulate else "24", *where)),
        device("device-100", "all experts on the device", 50, 6, "--shares", "100", "--settings", "auto", "--exact"),
        Part(key="kernels", title="kernels, each alone", limit_s=75, minutes=9, records=True,
             command=(here, "-X", "faulthandler", *BENCH, "triton-kernels", *tiny)),
        Part(key="far-slots", title="misses read over the link by the kernels", limit_s=35, minutes=9, records=True,
             command=(here, "-X", "faulthandler", *BENCH, "far-slots", *tiny)),
        device("device-cpu", "a quarter, misses in RAM", 45, 9, "--shares", "25", "--settings", "miss cpu"),
        device("device-stream", "a quarter, misses streamed", 45, 9, "--shares", "25", "--settings", "miss stream"),
        tests("compiled", "tests of compiled steps", 90, 9, "tests/gpu/test_compiled_on_gpu.py"),
        *([] if simulate else [
            device("device-compiled", "all experts, compiled", 90, 9, "--shares", "100", "--settings", "compiled"),
        ]),
    ]  # fmt: skip


def build_part() -> Part:
    """The CPU kernels, built in place: without them whatever is computed in RAM is torch's."""
    return Part(
        key="build", title="CPU kernels are built", limit_s=150,
        command=(sys.executable, "setup.py", "-q", "build_ext", "--inplace"),
    )  # fmt: skip


# A part that goes wrong on purpose, for rehearsals: the others' results must stand.
SPOILT = {
    "hang": "import time; print('hanging', flush=True); time.sleep(100000)",
    "crash": "import os; print('crashing', flush=True); os.abort()",
    "memory": "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 28, 1 << 28)); bytearray(1 << 30)",
}


def spoil(part: Part, how: str) -> Part:
    """The part with a command that hangs, crashes or is refused memory."""
    return Part(
        key=part.key, title=part.title, limit_s=1.0, minutes=part.minutes,
        command=(sys.executable, "-X", "faulthandler", "-c", SPOILT[how]),
    )  # fmt: skip


def run_part(part: Part, *, limit_s: float, log: Path | None = None, partial: Path | None = None) -> Outcome:
    """Run it, show its lines as they come and append them to `log`, end it at its limit.

    Never raises for what the part does.
    """
    command = list(part.command)
    if part.records and partial is not None:
        command += ["--seconds", f"{max(1.0, limit_s - RESERVE_S):.0f}", "--partial", str(partial)]
    script = next((Path(word) for word in command if word.startswith("scripts/")), None)
    if script is not None and not (ROOT / script).is_file():
        return Outcome(part=part, seconds=0.0, failure=f"there is no {script}", lines=())
    environment = {
        **os.environ, "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1",
        "TOKENIZERS_PARALLELISM": "false", **part.environment,
    }  # fmt: skip
    begin = time.monotonic()
    lines: list[str] = []
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace", start_new_session=True,
    ) as process:  # fmt: skip
        reader = threading.Thread(target=_read, args=(process, lines, log, part.title), daemon=True)
        reader.start()
        try:
            failure = _wait(process, limit_s)
        finally:
            _end(process)
        reader.join(KILL_AFTER_S)
    return Outcome(part=part, seconds=time.monotonic() - begin, failure=failure, lines=tuple(lines))


def _read(process: subprocess.Popen[str], lines: list[str], log: Path | None, title: str) -> None:
    assert process.stdout is not None
    with open(log or os.devnull, "a", encoding="utf-8") as file:
        file.write(f"\n==== {title}\n")
        for line in process.stdout:
            lines.append(line.rstrip("\n").replace(str(ROOT), "."))
            file.write(lines[-1] + "\n")
            file.flush()
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
    """The part's own process group, which it began: first made to say where it is, then ended."""
    for number in (signal.SIGABRT, signal.SIGKILL):
        if process.poll() is not None and number is signal.SIGABRT:
            continue  # its children, if any are left, are ended without a word
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
