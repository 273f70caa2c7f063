"""State of the whole process that torch's compiler puts back to what it was when a compilation began.

In the background that was a minute ago. Meanwhile other threads have drawn random numbers, or have made a model, for
which transformers sets the default type. torch would have them draw the same numbers again, and leave the type of a
model that was being made when the compilation began as the default for good.
"""

from __future__ import annotations

import torch


class ProcessState:
    """The default type and the default generators' states. Taken when torch has compiled, and put back when it has
    returned some milliseconds later.
    """

    def __init__(self) -> None:
        self._dtype, self._rng = torch.get_default_dtype(), torch.random.get_rng_state()
        self._cuda_rng = torch.cuda.get_rng_state() if torch.cuda.is_available() else None

    def put_back(self) -> None:
        """Undo what torch has put back. Called on the thread that compiled."""
        torch.set_default_dtype(self._dtype)
        torch.random.set_rng_state(self._rng)
        if self._cuda_rng is not None:
            torch.cuda.set_rng_state(self._cuda_rng)
