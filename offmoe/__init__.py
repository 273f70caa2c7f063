"""offmoe: Mixture-of-Experts language models larger than memory, run exactly, on one machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from offmoe.api import load as load
    from offmoe.core.errors import BudgetError as BudgetError
    from offmoe.core.errors import CheckpointChangedError as CheckpointChangedError
    from offmoe.core.errors import CheckpointError as CheckpointError
    from offmoe.core.errors import ContextLengthError as ContextLengthError
    from offmoe.core.errors import DeviceError as DeviceError
    from offmoe.core.errors import DiskReadError as DiskReadError
    from offmoe.core.errors import EngineBusyError as EngineBusyError
    from offmoe.core.errors import EngineClosedError as EngineClosedError
    from offmoe.core.errors import HubUnreachableError as HubUnreachableError
    from offmoe.core.errors import ModelNotFoundError as ModelNotFoundError
    from offmoe.core.errors import NonFiniteError as NonFiniteError
    from offmoe.core.errors import OffmoeError as OffmoeError
    from offmoe.core.errors import OutputError as OutputError
    from offmoe.core.errors import ResourceError as ResourceError
    from offmoe.core.errors import TraceError as TraceError
    from offmoe.core.errors import UnsupportedModelError as UnsupportedModelError
    from offmoe.core.errors import UsageError as UsageError
    from offmoe.engine.conversation import Conversation as Conversation
    from offmoe.engine.engine import Engine as Engine
    from offmoe.engine.engine_stats import EngineStats as EngineStats
    from offmoe.engine.reply import Reply as Reply
    from offmoe.engine.stats import GenerationStats as GenerationStats
    from offmoe.engine.stream import Chunk as Chunk
    from offmoe.engine.stream import Stream as Stream
    from offmoe.sampling.logprobs import Logprob as Logprob
    from offmoe.sampling.params import SamplingParams as SamplingParams

_NAMES = {
    "offmoe.api": ("load",),
    "offmoe.core.errors": (
        "BudgetError", "CheckpointChangedError", "CheckpointError", "ContextLengthError", "DeviceError",
        "DiskReadError", "EngineBusyError", "EngineClosedError", "HubUnreachableError", "ModelNotFoundError",
        "NonFiniteError", "OffmoeError", "OutputError", "ResourceError", "TraceError", "UnsupportedModelError",
        "UsageError",
    ),
    "offmoe.engine.conversation": ("Conversation",),
    "offmoe.engine.engine": ("Engine",),
    "offmoe.engine.engine_stats": ("EngineStats",),
    "offmoe.sampling.logprobs": ("Logprob",),
    "offmoe.sampling.params": ("SamplingParams",),
    "offmoe.engine.reply": ("Reply",),
    "offmoe.engine.stats": ("GenerationStats",),
    "offmoe.engine.stream": ("Chunk", "Stream"),
}  # fmt: skip
_MODULES = {name: module for module, names in _NAMES.items() for name in names}
__all__ = ["__version__", *_MODULES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    """Import on first use, so that `import offmoe` and the command line's help cost milliseconds."""
    if name not in _MODULES:
        raise AttributeError(f"module 'offmoe' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
