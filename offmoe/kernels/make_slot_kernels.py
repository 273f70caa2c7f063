"""The choice of slot kernels: Triton where it is there and agrees with torch, else torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch

from offmoe.checkpoint.expert_index import MoeLayer
from offmoe.kernels.reference import ExpertMath
from offmoe.kernels.slot_kernels import SlotKernels, TorchSlotKernels

Backend = Literal["auto", "torch", "triton"]


def make_slot_kernels(
    layers: Sequence[MoeLayer], maths: Sequence[ExpertMath], slab: torch.Tensor, slot_bytes: int,
    *, slot_of_LE: torch.Tensor | None = None, missing_L: torch.Tensor | None = None, backend: Backend = "auto",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> SlotKernels:  # fmt: skip
    """The kernels of a model whose experts lie in `slab` (uint8, slots of `slot_bytes`), one math a layer.

    "auto" takes Triton on a CUDA device. There it tries every kind of layer on random weights, which it writes into the
    first slots: call it before anything is kept there. A layer whose kernels fail or disagree is left to torch, with a
    reason. The first time on a machine the compiler runs, some seconds a kind of layer: `progress(done, total)` counts
    kernels.
    `slot_of_LE` (int32, the slot of every expert or -1) and `missing_L` (int32) are read and written on the device.
    """
    fallback = TorchSlotKernels(layers, maths, slab, slot_bytes, slot_of_LE=slot_of_LE, missing_L=missing_L)
    if backend == "torch" or (backend == "auto" and slab.device.type != "cuda"):
        fallback.reasons = dict.fromkeys(range(len(layers)), f"computed by torch on {slab.device.type}")
        return fallback
    try:
        from offmoe.kernels.triton.slots import make_triton_kernels
    except ImportError as error:
        fallback.reasons = dict.fromkeys(range(len(layers)), f"triton cannot be imported: {error}")
        return fallback
    return make_triton_kernels(layers, maths, slab, slot_bytes, fallback, slot_of_LE, missing_L, progress)
