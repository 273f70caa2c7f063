"""The copier of a machine without a device: the copy is made before the ticket is returned."""

from __future__ import annotations

from collections.abc import Sequence

from offmoe.tiers.copier import CopyPart, check_parts, move_bytes


class DoneTicket:
    """A move that had ended before the ticket was made."""

    def done(self) -> bool:
        """Always True."""
        return True

    def wait(self) -> None:
        """Return at once."""

    def cancel(self) -> bool:
        """Always too late."""
        return False

    def promote(self) -> None:
        """Nothing to hurry."""


class InlineCopier:
    """Copies on the calling thread."""

    def copy(self, parts: Sequence[CopyPart], *, urgent: bool = True, after: object | None = None) -> DoneTicket:
        """Copy now."""
        check_parts(parts)
        for src, dst in parts:
            move_bytes(src, dst)
        return DoneTicket()

    def mark(self) -> None:
        """Work has ended when it returns."""

    def restart(self) -> None:
        """Nothing is under way."""

    def close(self) -> None:
        """Nothing to release."""
