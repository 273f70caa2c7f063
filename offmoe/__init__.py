"""offmoe: Mixture-of-Experts language models larger than memory, run exactly, on one machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from offmoe.api import load as load
    from offmoe.base.errors import OffmoeError as OffmoeError
    from offmoe.generation.conversation import Conversation as Conversation
    from offmoe.generation.engine import Engine as Engine
    from offmoe.generation.reply import Reply as Reply
    from offmoe.generation.stream import Piece as Piece

_HOMES = {
    "load": "offmoe.api", "Conversation": "offmoe.generation.conversation", "OffmoeError": "offmoe.base.errors",
    "Engine": "offmoe.generation.engine", "Reply": "offmoe.generation.reply", "Piece": "offmoe.generation.stream",
}  # fmt: skip
__all__ = ["Conversation", "Engine", "OffmoeError", "Piece", "Reply", "__version__", "load"]


def __getattr__(name: str) -> Any:
    """Import on first use, so that `import offmoe` and the command line's help cost milliseconds."""
    if name not in _HOMES:
        raise AttributeError(f"module 'offmoe' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
