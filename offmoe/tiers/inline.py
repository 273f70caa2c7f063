"""The copier of a machine without a device: the copy is made before the ticket is returned."""

from __future__ import annotations

import torch

from offmoe.tiers.copier import DoneTicket, flatten


class InlineCopier:
    """Copies on the calling thread."""

    def copy(self, src: torch.Tensor, dst: torch.Tensor) -> DoneTicket:
        """Copy now."""
        src, dst = flatten(src, dst)
        dst.copy_(src)
        return DoneTicket()

    def close(self) -> None:
        """Nothing to release."""
