"""`fast_activations`: whether it can be had, whether it is right, and what of a model it changes.

Shapes: T rows, N outputs, K columns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from offmoe.base.errors import UsageError
from offmoe.checkpoint.expert_index import ExpertIndex, QuantPart
from offmoe.checkpoint.quant_format import QuantFormat
from offmoe.formats.encode import encode, integer_format
from offmoe.kernels.cpu.decode import CpuLinear
from offmoe.kernels.cpu.kernels import CpuKernels
from offmoe.kernels.int8_activations import round_activations, rounds

if TYPE_CHECKING:
    from offmoe.models.serving import Serving

ROUNDING_LABEL = "int8 activations"
# Of the sum of the products' sizes: float32 sums of 96 columns keep all but the last bits.
_TOLERANCE = 2**-20


def start_rounding(kernels: CpuKernels | None, why_no_kernels: str) -> None:
    """Let `kernels` round activations, after products of theirs agree with the reference.

    Raises UsageError where there are none, and where they disagree.
    """
    if kernels is None:
        raise UsageError(
            f"fast_activations needs the CPU kernels, and there are none: {why_no_kernels}; leave it out, or install "
            "offmoe with a C++ compiler"
        )
    kernels.rounds_activations = True
    for kind in ("int4", "int8"):
        if not _agree(kernels, kind):
            raise UsageError(
                f"fast_activations: products of {kind} weights are not what the reference says on this processor "
                f"({kernels.level}); leave it out, and tell us"
            )


def _agree(kernels: CpuKernels, kind: str) -> bool:
    generator = torch.Generator().manual_seed(1)
    weight_NK, x_TK = (torch.randn(5, 96, generator=generator) for _ in range(2))
    matrix = encode(weight_NK, integer_format(kind, group=32, scale_dtype="F32"), name=kind)
    values_KN, rounded_TK = matrix.dequantise(torch.float64).t(), round_activations(x_TK)
    linear = CpuLinear(kernels, matrix, None, dtype=x_TK.dtype)
    error_TN = (linear(x_TK).double() - rounded_TK @ values_KN).abs()
    return bool((error_TN <= _TOLERANCE * (rounded_TK.abs() @ values_KN.abs())).all())


def note_rounding(
    serving: Serving, experts: ExpertIndex, linears: list[QuantFormat], *, on_device: bool
) -> None:  # fmt: skip
    """Note, for the user and in `serving.rounds`, what is rounded. `linears`: formats of those that stay quantised."""
    layers = () if on_device and serving.placer is None else experts.layers  # there the CPU computes no experts
    parts = [part for layer in layers for part in (*layer.up, *layer.down)]
    in_experts = any(isinstance(part, QuantPart) and rounds(part.format) for part in parts)
    num_linears = sum(rounds(form) for form in linears)
    serving.rounds = in_experts or num_linears > 0
    if not serving.rounds:
        serving.notes.append(
            "fast_activations changes nothing here: no weights of int4, int8 or mxfp4 are computed on the CPU"
        )
        return
    named = (("experts", in_experts), (f"{num_linears} linear layers", num_linears))
    what = " and ".join(name for name, there in named if there)
    serving.notes.append(
        f"{ROUNDING_LABEL}: what the CPU computes of {what} is of activations rounded to 8 bits, so replies are not "
        "exactly the model's own; offmoe verify --fast-activations says what it costs"
    )
