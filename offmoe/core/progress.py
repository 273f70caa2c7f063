"""The form in which anything that takes time tells how far it is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, and how much of how much of it is done (bytes, tokens or files)."""
