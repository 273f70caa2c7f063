"""What tensors are made while something runs."""

from __future__ import annotations

import torch
from torch.overrides import TorchFunctionMode


class Largest(TorchFunctionMode):
    """The largest tensor that an operation was given or made, in numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        return result
