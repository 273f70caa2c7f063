"""Writes an engine's routing to a file while it generates."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from offmoe.checkpoint.identity import model_hash
from offmoe.core.errors import EngineBusyError, UsageError
from offmoe.hf.device_failures import explained
from offmoe.hf.internals import experts_modules
from offmoe.hf.seam import find_binding
from offmoe.loader.loaded import LoadedModel
from offmoe.moe.resident import ResidentExecutor
from offmoe.prefetch.guesses import GuessWriter
from offmoe.routers.routing import map_routing
from offmoe.trace.file import TraceHeader, TraceWriter
from offmoe.trace.recorder import Recorder


def trace_header(loaded: LoadedModel, folder: Path, prompts: dict[str, Any]) -> TraceHeader:
    """The header of a trace of this model, made now."""
    layers = loaded.experts.layers
    return TraceHeader(
        model=folder.name, model_hash=model_hash(folder, loaded.index.stored),
        experts_per_layer=tuple(layer.num_experts for layer in layers), top_k=loaded.experts.top_k,
        expert_bytes=tuple(layer.expert_bytes for layer in layers),
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), prompts=prompts,
    )  # fmt: skip


@contextmanager
def record_trace(
    loaded: LoadedModel, folder: Path, path: Path, *, prompts: dict[str, Any], guesses: bool, overwrite: bool
) -> Iterator[TraceWriter]:
    """Within: every layer call is written to `path`. See Engine.trace."""
    recorder = loaded.serving.recorder
    if isinstance(loaded.serving.executor, ResidentExecutor):
        raise UsageError(
            f"all {loaded.plan.num_experts} experts are on the device, where routers are not listened to; "
            f"use expert_slots={loaded.plan.num_experts - 1} (--expert-slots) to trace this model"
        )
    if recorder.sink is not None:
        raise EngineBusyError("a trace is being recorded already; end that one first")
    with ExitStack() as last_to_first:
        if guesses:
            with explained(loaded.device):  # it runs the model
                last_to_first.enter_context(_guessing(loaded, recorder))
        writer = last_to_first.enter_context(
            TraceWriter(path, trace_header(loaded, folder, prompts), overwrite=overwrite)
        )
        recorder.forget_guesses()
        recorder.sink = writer
        try:
            yield writer
        finally:
            recorder.sink = None


@contextmanager
def _guessing(loaded: LoadedModel, recorder: Recorder) -> Iterator[None]:
    """Within: routers are asked ahead of time, beside whatever else looks ahead."""
    with loaded.uncached():  # looking through the model runs it, which is no business of the cache
        routing = map_routing(loaded.model)
    bindings = [binding for _, module in experts_modules(loaded.model) if (binding := find_binding(module))]
    observers = [binding.observer for binding in bindings]
    hooks = routing.install(GuessWriter(routing.predictors, routing.order, recorder))
    try:
        yield
    finally:
        hooks.remove()
        for binding, observer in zip(bindings, observers, strict=True):
            binding.observer = observer
