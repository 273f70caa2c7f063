"""One token's attention by the CPU kernels, for models whose own code asks transformers' attention functions.

The fused step (decode/) computes whole layers of families that it knows. Attention modules of all others hand query,
keys and values over, and torch reads those at 4 GB/s for one bfloat16 query; the kernels at 15
(benchmarks/2026-11-23-cpu-attention.md). The numbers are those of the fused operation up to rounding, which is seen the
first time that heads of a kind are computed: where the two differ, torch's stays.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from offmoe.hf.replace import TOLERANCES, agree
from offmoe.kernels.cpu.decode import AttentionShape, CpuAttention
from offmoe.kernels.cpu.kernels import CpuKernels

_NAME = "_offmoe_token_attention"

Reference = Callable[[], torch.Tensor]


class TokenAttention:
    """One model's attention of single tokens, until `close`."""

    def __init__(self, kernels: CpuKernels) -> None:
        self._kernels: CpuKernels | None = kernels
        # None: they were compared, and differed.
        self._calls: dict[tuple[AttentionShape, int], CpuAttention | None] = {}

    def close(self) -> None:
        """From now on nothing is taken."""
        self._kernels = None

    def takes(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks_H: torch.Tensor | None) -> bool:
        """It is one token (1, H, 1, K) that sees all rows, (1, G, S, K) and (1, G, S, V), on the CPU."""
        if self._kernels is None or query.shape[0] != 1 or query.shape[2] != 1 or torch.is_grad_enabled():
            return False
        if torch.compiler.is_compiling() or query.device.type != "cpu" or query.dtype not in TOLERANCES:
            return False
        rows = (key, value)
        return (
            not query.shape[1] % key.shape[1]
            and all(states.dtype == query.dtype and states.stride(-1) == 1 for states in rows)
            and key.shape[-1] == query.shape[-1]
            and key.shape[:3] == value.shape[:3]
            and (sinks_H is None or (sinks_H.dtype == query.dtype and sinks_H.is_contiguous()))
        )

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None,
        reference: Reference, sinks_H: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """The heads' results, (1, 1, H, V). `takes` said True; `reference` computes them by torch, of that shape."""
        assert self._kernels is not None
        shape = AttentionShape(
            num_heads=query.shape[1], num_groups=key.shape[1], width=query.shape[3], value_width=value.shape[3],
            scale=query.shape[3] ** -0.5 if scaling is None else scaling, dtype=query.dtype,
        )  # fmt: skip
        kind = shape, 0 if sinks_H is None else sinks_H.data_ptr()
        is_new = kind not in self._calls
        call = CpuAttention(self._kernels, shape, sinks_H=sinks_H) if is_new else self._calls[kind]
        if call is None:
            return reference()
        ours = call.attend(query.contiguous(), key[0], value[0]).view(1, 1, shape.num_heads, shape.value_width)
        if is_new:
            theirs = reference()
            self._calls[kind] = call if agree(ours, theirs) else None
            return ours if self._calls[kind] else theirs
        return ours


def token_attention(module: nn.Module) -> TokenAttention | None:
    """That of a module, if it has one."""
    found: TokenAttention | None = module.__dict__.get(_NAME)
    return found


def set_token_attention(module: nn.Module, attention: TokenAttention) -> None:
    """For this module from now on."""
    module.__dict__[_NAME] = attention
