"""`offmoe.load`: the one door for programs. Importing it costs nothing; calling it imports torch and transformers."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from offmoe.core.config import (
    CompileMode,
    Count,
    EngineConfig,
    EvictionPolicy,
    IoMode,
    MissMode,
    PackMode,
    PrefetchDistance,
    Size,
    make_config,
)
from offmoe.core.progress import Progress
from offmoe.loader.fetch import fetch_model
from offmoe.machine.memory import rss_bytes

if TYPE_CHECKING:
    from offmoe.engine.engine import Engine
    from offmoe.engine.engine_stats import EngineStats
    from offmoe.tiers.device import Device

_log = logging.getLogger("offmoe")


def load(
    model: str | os.PathLike[str] | None = None,
    *,
    ram: Size | None = None,
    vram: Size | None = None,
    context_length: Count | None = None,
    expert_slots: Count | None = None,
    prefill_chunk: Count | None = None,
    kept_prompts: Size | None = None,
    prompt_cache: str | os.PathLike[str] | None = None,
    prompt_cache_size: Size | None = None,
    policy: EvictionPolicy = "auto",
    warm_start: bool = True,
    io: IoMode = "auto",
    device: str = "auto",
    miss: MissMode = "auto",
    prefetch: PrefetchDistance = "auto",
    compile: CompileMode = "auto",  # noqa: A002
    pack: PackMode = "auto",
    placement_invariant: bool = False,
    trust_remote_code: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    progress: Progress = lambda stage, done, total: None,
    tell: Callable[[str], None] | None = None,
    experts: Count | None = None,
) -> Engine:
    """Load a Mixture-of-Experts model and return its engine. Use it in a `with` statement, or close it.

    model                a folder, a GGUF file, a name on the hub ("owner/name"), or None: the bundled demo model
    ram                  "16GiB" or bytes that the process may grow by, with libraries; default: most of what is free
    vram                 "6GiB" or bytes of the device, with the driver's; default: most of what is free there
    context_length       tokens of prompt plus reply to set memory aside for; default: 4096, at most the model's limit
    expert_slots         experts to keep where they are computed; default: as many as ram or vram has room for
    prefill_chunk        prompt tokens that go through the model at once; default: what memory allows
    kept_prompts         "1GiB" or bytes of ram for prompts that were read, 0: none; default: what two contexts take, at
                         most a sixteenth of what the fixed parts leave
    prompt_cache         a folder where such prompts are kept from run to run; default: none
    prompt_cache_size    "20GiB" or bytes that the folder may have; default: 16 GiB
    policy               eviction: "lru", "lfru", "decayed"; default "auto": what would read least
    warm_start           count uses of experts from run to run, in the user's cache folder; default True
    io                   "direct" reads or reads through the page cache ("buffered"); default "auto": direct if possible
    device               "cpu", "cuda" or "cuda:N"; default "auto": a CUDA device if there is one
    miss                 a missing expert is copied to the device ("stream") or computed in RAM ("cpu"); default "auto"
    prefetch             layers ahead that experts are fetched, 1 to 3, or "off"; default "auto": while it saves time
    compile              compile the model's resident part: "on", "off"; default "auto": on a CUDA device
    pack                 keep bfloat16 in 12 bits in RAM, without loss: "on", "off"; default "auto": where it is faster
    placement_invariant  compute all experts in one place: rounding does not depend on the cache; default False
    trust_remote_code    run Python code that comes with the model; default False
    revision             branch, tag or commit of the model on the hub; default: its main branch
    token                access token for the hub, False: none; default: HF_TOKEN or that of `hf auth login`
    progress             called with (stage, done, total) in bytes while the model is fetched and read
    tell                 called with a line about plan and outcome on a probed machine; default: logged as INFO
    experts              former name of expert_slots; the next release drops it

    The plan is told before loading, predicted beside measured values when the engine is closed.
    Raises OffmoeError subclasses in one line each; all are exported from `offmoe`.
    """
    baseline_bytes = rss_bytes()
    if experts is not None:
        line = "load(experts=...) is expert_slots= now; the next release drops the old name"
        warnings.warn(line, DeprecationWarning, stacklevel=2)
    config = make_config(
        ram=ram, vram=vram, context_length=context_length,
        expert_slots=experts if expert_slots is None else expert_slots, prefill_chunk=prefill_chunk,
        kept_prompts=kept_prompts, prompt_cache=prompt_cache, prompt_cache_size=prompt_cache_size, policy=policy,
        warm_start=warm_start, io=io, device=device, miss=miss, prefetch=prefetch, compile=compile,
        pack=pack, placement_invariant=placement_invariant, trust_remote_code=trust_remote_code, revision=revision,
    )  # fmt: skip
    folder = fetch_model(model, config, progress, token=token)
    return load_engine(folder, config, baseline_bytes=baseline_bytes, progress=progress, tell=tell or _log.info)


def load_engine(
    folder: Path, config: EngineConfig, *, baseline_bytes: int, tell: Callable[[str], None],
    progress: Progress = lambda stage, done, total: None, device: Device | None = None,
) -> Engine:  # fmt: skip
    """Load the model in `folder`, or that GGUF file: `load` for the command line and for tests.

    `baseline_bytes`: resident memory that the budget counts from. `device`: used instead of the one that `config`
    names, and closed with the engine. Arguments else as of `load`.
    """
    from offmoe.planner.make_plan import against_plan, predict_plan

    foreseen = None if device is not None else predict_plan(folder, config)
    if foreseen is not None:
        tell(f"plan: {foreseen.line()}")
    from offmoe.engine.engine import Engine

    engine = Engine(folder, config, baseline_bytes=baseline_bytes, progress=progress, device=device)
    engine.predicted = None if foreseen is None else foreseen.predicted()
    if engine.predicted is not None:

        def check(totals: EngineStats) -> None:
            if (line := against_plan(totals)) is not None:
                tell(line)

        engine.at_close = check
    return engine
