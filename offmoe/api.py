"""`offmoe.load`: the one door for programs. Importing it costs nothing; calling it imports torch and transformers."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from offmoe.base.config import make_config
from offmoe.base.machine import rss_bytes
from offmoe.checkpoint.locate import locate_model

if TYPE_CHECKING:
    from offmoe.generation.engine import Engine
    from offmoe.tiers.device import Device


def load(
    model: str | os.PathLike[str] | None = None, *,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
    _baseline_bytes: int | None = None, _device: Device | None = None, **options: Any,
) -> Engine:  # fmt: skip
    """Load a model: a folder, a hub id, or None for the bundled demo model.

    Options (each may be "auto"): ram="16GiB" (what the process may grow by from here, libraries included),
    vram="6GiB", context_length=4096, experts=N (slots, instead of what vram or ram leaves room for), prefill_chunk=N,
    policy="lru", io="direct"|"buffered", device="cpu"|"cuda"|"cuda:N", miss="stream"|"cpu", prefetch="off"|1..3,
    compile="off"|"on", placement_invariant=False, trust_remote_code=False. What each does: offmoe.base.config.
    `progress(stage, done_bytes, total_bytes)`.

    `_baseline_bytes` is for the command line: resident memory that the budget counts from, instead of what is resident
    now. `_device` is for tests: used instead of the one that `device` names, and closed with the engine.

    Raises OffmoeError subclasses: see offmoe.base.errors.
    """
    config = make_config(**options)
    folder = locate_model(model)
    baseline_bytes = rss_bytes() if _baseline_bytes is None else _baseline_bytes
    from offmoe.generation.engine import Engine

    return Engine(folder, config, baseline_bytes=baseline_bytes, progress=progress, device=_device)
