"""offmoe: Mixture-of-Experts language models larger than memory, run exactly, on one machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from offmoe.api import load as load
    from offmoe.base.errors import BudgetError as BudgetError
    from offmoe.base.errors import CheckpointChangedError as CheckpointChangedError
    from offmoe.base.errors import CheckpointError as CheckpointError
    from offmoe.base.errors import ContextLengthError as ContextLengthError
    from offmoe.base.errors import DeviceError as DeviceError
    from offmoe.base.errors import DiskReadError as DiskReadError
    from offmoe.base.errors import EngineBusyError as EngineBusyError
    from offmoe.base.errors import EngineClosedError as EngineClosedError
    from offmoe.base.errors import HubUnreachableError as HubUnreachableError
    from offmoe.base.errors import ModelNotFoundError as ModelNotFoundError
    from offmoe.base.errors import NonFiniteError as NonFiniteError
    from offmoe.base.errors import OffmoeError as OffmoeError
    from offmoe.base.errors import OutputError as OutputError
    from offmoe.base.errors import ResourceError as ResourceError
    from offmoe.base.errors import TraceError as TraceError
    from offmoe.base.errors import UnsupportedModelError as UnsupportedModelError
    from offmoe.base.errors import UsageError as UsageError
    from offmoe.generation.conversation import Conversation as Conversation
    from offmoe.generation.engine import Engine as Engine
    from offmoe.generation.reply import Reply as Reply
    from offmoe.generation.stream import Piece as Piece

_NAMES = {
    "offmoe.api": ("load",),
    "offmoe.base.errors": (
        "BudgetError", "CheckpointChangedError", "CheckpointError", "ContextLengthError", "DeviceError",
        "DiskReadError", "EngineBusyError", "EngineClosedError", "HubUnreachableError", "ModelNotFoundError",
        "NonFiniteError", "OffmoeError", "OutputError", "ResourceError", "TraceError", "UnsupportedModelError",
        "UsageError",
    ),
    "offmoe.generation.conversation": ("Conversation",),
    "offmoe.generation.engine": ("Engine",),
    "offmoe.generation.reply": ("Reply",),
    "offmoe.generation.stream": ("Piece",),
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
