"""The parts of an engine that measurements look at: sizes, counters, and the way that tokens take."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

from offmoe.checkpoint.expert_index import ExpertIndex
from offmoe.checkpoint.index import CheckpointIndex
from offmoe.core.counters import Counters
from offmoe.core.errors import UsageError
from offmoe.decode.compiled import DecodeCompiler
from offmoe.decode.paths import DecodePaths
from offmoe.engine.engine import Engine
from offmoe.loader.serving import Serving


@dataclass(frozen=True, kw_only=True)
class EngineParts:
    """Valid until the engine is closed. Nothing here may be changed while it generates."""

    index: CheckpointIndex
    """The checkpoint's tensors."""
    experts: ExpertIndex
    """The routed experts: layers, sizes, places in the files."""
    serving: Serving
    decode: DecodeCompiler | DecodePaths

    def counters(self) -> Counters:
        """Return a copy of the counters since load."""
        return self.serving.cache.counters.copy()

    def only_eager(self, why: str) -> AbstractContextManager[None]:
        """Context in which transformers' modules compute every token, for the reason given in statistics.

        Raises UsageError for an engine that compiles its steps.
        """
        if not isinstance(self.decode, DecodePaths):
            raise UsageError("an engine that compiles its steps cannot be held to transformers' modules; compile=off")
        return self.decode.only_eager(why)


def parts_of(engine: Engine) -> EngineParts:
    """Return the parts of an open engine. Raises EngineClosedError."""
    loaded = engine._parts
    return EngineParts(index=loaded.index, experts=loaded.experts, serving=loaded.serving, decode=engine._decode)
