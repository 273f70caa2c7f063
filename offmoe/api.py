"""`offmoe.load`: the one door for programs. Importing it costs nothing; calling it imports torch and transformers."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from offmoe.base.config import make_config
from offmoe.base.machine import rss_bytes
from offmoe.models.fetch import fetch_model

if TYPE_CHECKING:
    from offmoe.generation.engine import Engine
    from offmoe.tiers.device import Device


def _to_stderr(line: str) -> None:
    if sys.stderr is not None:  # a program without a console has none
        sys.stderr.write(f"{line}\n")


def load(
    model: str | os.PathLike[str] | None = None, *,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
    tell: Callable[[str], None] | None = _to_stderr, _baseline_bytes: int | None = None,
    _device: Device | None = None, **options: Any,
) -> Engine:  # fmt: skip
    """Load a model: a folder, a hub id, or None for the bundled demo model.

    Options (each may be "auto"): ram="16GiB" (what the process may grow by from here, libraries included),
    vram="6GiB", context_length=4096, expert_slots=N (instead of what vram or ram leaves room for), prefill_chunk=N,
    policy="lru", io="direct"|"buffered", device="cpu"|"cuda"|"cuda:N", miss="stream"|"cpu", prefetch="off"|1..3,
    compile="off"|"on", placement_invariant=False, trust_remote_code=False. What each does: offmoe.base.config.
    `progress(stage, done_bytes, total_bytes)`.

    On a machine that was probed (`offmoe probe`), `tell` is given the plan in a line before anything is loaded, and
    when the engine is closed what was predicted beside what was measured; by default they go to stderr, None is
    silence. `engine.stats()["predicted"]` has the figures.

    `_baseline_bytes` is for the command line: resident memory that the budget counts from, instead of what is resident
    now. `_device` is for tests: used instead of the one that `device` names, and closed with the engine.

    Raises OffmoeError subclasses: see offmoe.base.errors.
    """
    if (slots := options.pop("experts", None)) is not None:
        line = "load(experts=...) is expert_slots= now; the next release drops the old name"
        warnings.warn(line, DeprecationWarning, stacklevel=2)
        options.setdefault("expert_slots", slots)
    config = make_config(**options)
    baseline_bytes = rss_bytes() if _baseline_bytes is None else _baseline_bytes
    folder = fetch_model(model, config, progress)
    from offmoe.planner.foresee import against_plan, foresee

    foreseen = None if _device is not None else foresee(folder, config)
    if foreseen is not None and tell is not None:
        tell(f"plan: {foreseen.line()}")
    from offmoe.generation.engine import Engine

    engine = Engine(folder, config, baseline_bytes=baseline_bytes, progress=progress, device=_device)
    engine.predicted = None if foreseen is None else foreseen.predicted()
    if engine.predicted is not None and tell is not None:

        def check(totals: dict[str, Any]) -> None:
            if (line := against_plan(totals)) is not None:
                tell(line)

        engine.at_close = check
    return engine
