"""One token's norms, attention and experts by the library.

Shapes: H heads, G groups of heads that share keys and values, S rows of a cache, K experts, D model width.
Calls fill a struct that is made once: a decode step makes some hundred of them, and each costs a few microseconds. So
an object here serves one thread at a time, as a model whose experts come through a cache does.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from offmoe.formats.dense import ExpertWeights
from offmoe.kernels.cpu import structs
from offmoe.kernels.cpu.kernels import CpuKernels, CpuLayer
from offmoe.kernels.cpu.matrices import Weight, describe

NormKind = Literal["weight_last", "weight_first", "one_plus_weight", "centred"]
NORM_KINDS: dict[NormKind, int] = {"weight_last": 0, "weight_first": 1, "one_plus_weight": 2, "centred": 3}


class CpuNorm:
    """RMS norm over the last dimension, rounded to x's type where `kind` says:

    weight_last: round(x / rms) * weight; weight_first: x / rms * weight; one_plus_weight: x / rms * (1 + weight).
    centred: a layer norm, weight_first after the mean was subtracted, plus `bias_D`.
    """

    def __init__(
        self, kernels: CpuKernels, weight_D: torch.Tensor, *, eps: float, kind: NormKind,
        bias_D: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        assert weight_D.is_contiguous() and weight_D.device.type == "cpu", f"{weight_D.shape=}"
        assert bias_D is None or (kind == "centred" and bias_D.is_contiguous() and bias_D.dtype == weight_D.dtype)
        self.weight_D, self.eps, self.kind = weight_D, eps, kind
        self._kernels, self._bias_D = kernels, bias_D
        self.call = structs.CNorm(
            weight=weight_D.data_ptr(), bias=None if bias_D is None else bias_D.data_ptr(), width=weight_D.numel(),
            eps=eps, kind=NORM_KINDS[kind], type=structs.TYPES[weight_D.dtype],
        )  # fmt: skip
        self._address = ctypes.addressof(self.call)

    def takes(self, x: torch.Tensor) -> bool:
        """Contiguous rows of the weight's type and width."""
        return x.dtype == self.weight_D.dtype and x.shape[-1] == self.call.width and x.is_contiguous()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Normed rows, of x's shape. `takes` said True. Raises MemoryError."""
        y, call = torch.empty_like(x), self.call
        call.x, call.y, call.rows = x.data_ptr(), y.data_ptr(), x.numel() // call.width
        self._kernels.run_norm(self._address)
        return y


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """Sizes of attention, the same for all tokens.

    `scale` multiplies scores. `neighbours`: each number turns with the one beside it, not with one of the other half.
    `norm_last`: norms, of one head each, come after turning. `cap`: scores become cap * tanh(score / cap).
    """

    num_heads: int
    num_groups: int
    width: int
    value_width: int
    scale: float
    dtype: torch.dtype
    neighbours: bool = False
    norm_last: bool = False
    cap: float | None = None


class CpuAttention:
    """Attention of one token of one layer. `sinks_H`: a logit a head that attends to nothing."""

    def __init__(
        self, kernels: CpuKernels, shape: AttentionShape, *, query_norm: CpuNorm | None = None,
        key_norm: CpuNorm | None = None, sinks_H: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        """Norms are of one head's width, or of all heads' together; both alike."""
        self._kernels, self.shape = kernels, shape
        sinks_H = None if sinks_H is None else sinks_H.float().contiguous()
        self._keep = (query_norm, key_norm, sinks_H)
        norm = query_norm
        self.struct = structs.CAttend(
            query_norm=None if query_norm is None else query_norm.weight_D.data_ptr(),
            key_norm=None if key_norm is None else key_norm.weight_D.data_ptr(),
            sinks=None if sinks_H is None else sinks_H.data_ptr(),
            num_heads=shape.num_heads, num_groups=shape.num_groups, width=shape.width, value_width=shape.value_width,
            norm_width=shape.width if norm is None else norm.weight_D.numel(), eps=0.0 if norm is None else norm.eps,
            norm_kind=0 if norm is None else NORM_KINDS[norm.kind], scale=shape.scale,
            type=structs.TYPES[shape.dtype], neighbours=int(shape.neighbours), norm_last=int(shape.norm_last),
            cap=shape.cap or 0.0,
        )  # fmt: skip
        assert norm is None or norm.kind != "centred", f"{norm.kind=}"
        assert not shape.norm_last or norm is None or norm.weight_D.numel() == shape.width, f"{shape=}"
        self._address = ctypes.addressof(self.struct)

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cos: torch.Tensor | None,
        sin: torch.Tensor | None, keys_GSW: torch.Tensor, values_GSW: torch.Tensor, *, half_angles: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        """The heads' outputs, (H * value width), of one token.

        `query`, `key` and `value` are the projections' contiguous outputs; `cos` and `sin` the angles of its position,
        a number for each that turns, or (`half_angles`) for each pair; in float32 where the model rounds only what was
        turned. The caches (G, S, width) hold S rows, the last of which is written here. Their last dimension has
        stride 1, and all but the angles is of one type. Raises MemoryError.
        """
        call = self.struct
        output = value.new_empty(call.num_heads * call.value_width)
        call.query, call.key, call.value = query.data_ptr(), key.data_ptr(), value.data_ptr()
        call.output = output.data_ptr()
        set_position(call, cos, sin, keys_GSW, values_GSW, half_angles=half_angles)
        self._kernels.run_attend(self._address)
        return output

    def attend(self, query: torch.Tensor, keys_GSW: torch.Tensor, values_GSW: torch.Tensor) -> torch.Tensor:
        """The same where the caches have the token's key and value, and the query is normed and rotated already."""
        call = self.struct
        output = query.new_empty(call.num_heads * call.value_width)
        call.query, call.key, call.value, call.output = query.data_ptr(), None, None, output.data_ptr()
        set_position(call, None, None, keys_GSW, values_GSW, half_angles=False)
        self._kernels.run_attend(self._address)
        return output


def set_position(
    call: structs.CAttend, cos: torch.Tensor | None, sin: torch.Tensor | None, keys_GSW: torch.Tensor,
    values_GSW: torch.Tensor, *, half_angles: bool,
) -> None:  # fmt: skip
    """Set what changes from token to token; see `CpuAttention`. Caches may have dimensions of size 1 before G."""
    size = keys_GSW.element_size()
    call.keys, call.values = keys_GSW.data_ptr(), values_GSW.data_ptr()
    if cos is None or sin is None:
        call.cos, call.sin, call.num_angles = None, None, 0
    else:
        call.cos, call.sin, call.num_angles = cos.data_ptr(), sin.data_ptr(), cos.numel()
        call.angle_type = structs.TYPES[cos.dtype]
        call.rotary = call.num_angles * (2 if half_angles else 1)
    *_, group, row, _ = keys_GSW.stride()
    call.key_group_bytes, call.key_row_bytes = group * size, row * size
    *_, group, row, _ = values_GSW.stride()
    call.value_group_bytes, call.value_row_bytes, call.num_rows = group * size, row * size, keys_GSW.shape[-2]


class CpuLinear:
    """x @ weight.T + bias for rows of type `dtype`, which is the bias's, too; rounded once.

    `in_tiles`: for many rows, too, the library is fast.
    """

    def __init__(
        self, kernels: CpuKernels, weight_NK: Weight, bias_N: torch.Tensor | None, *, dtype: torch.dtype
    ) -> None:
        """`unreadable(weight_NK, dtype)` is None."""
        assert bias_N is None or (bias_N.dtype == dtype and bias_N.is_contiguous()), f"{bias_N=}"
        self._kernels, self.matrix, self.bias_N = kernels, describe(weight_NK), bias_N
        self.dtype, (self.num_outputs, self.num_inputs) = dtype, weight_NK.shape
        self.in_tiles = kernels.has_tiles and not self.matrix.struct.transposed
        type_idx, size = structs.TYPES[dtype], dtype.itemsize
        self.call = structs.CLinear(
            matrix=ctypes.addressof(self.matrix.struct), bias=None if bias_N is None else bias_N.data_ptr(),
            x_row_bytes=self.num_inputs * size, y_row_bytes=self.num_outputs * size, type=type_idx, x_type=type_idx,
        )  # fmt: skip
        self._address = ctypes.addressof(self.call)

    def takes(self, x: torch.Tensor) -> bool:
        """Contiguous rows of that type and the weight's width."""
        return x.dtype == self.dtype and x.shape[-1] == self.num_inputs and x.is_contiguous()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(..., N) of x (..., K). `takes` said True. Raises MemoryError."""
        y, call = x.new_empty(*x.shape[:-1], self.num_outputs), self.call
        call.x, call.y, call.num_x = x.data_ptr(), y.data_ptr(), x.numel() // self.num_inputs
        self._kernels.run_linear(self._address)
        return y


class CpuTokenExperts:
    """The weighted sum over one token's experts, of a layer where each token has K. The same numbers as `experts`."""

    def __init__(
        self, kernels: CpuKernels, layer: CpuLayer, top_k: int, x: torch.Tensor, weights: torch.Tensor
    ) -> None:
        """`x` and `weights` stand for all that follow, by their types."""
        self._kernels, self.layer = kernels, layer
        self._dtypes = (x.dtype, weights.dtype)
        self._y_KD = torch.empty(top_k, layer.width, dtype=layer.math.dtype)
        self._addresses = (ctypes.c_void_p * top_k)()
        self._numbers = (ctypes.c_int32 * (top_k + 1))(*range(top_k + 1))
        self._tokens = (ctypes.c_int32 * top_k)()
        x_bytes, numbers = layer.width * x.element_size(), ctypes.addressof(self._numbers)
        self._call = structs.CCall(
            activation=ctypes.addressof(layer.activation), experts=ctypes.addressof(self._addresses), begin=numbers,
            token=ctypes.addressof(self._tokens), choice=numbers, y=self._y_KD.data_ptr(), x_row_bytes=x_bytes,
            y_row_bytes=layer.width * self._y_KD.element_size(), total_row_bytes=x_bytes, num_experts=top_k,
            num_tokens=1, top_k=top_k, type=structs.TYPES[layer.math.dtype], x_type=structs.TYPES[x.dtype],
            weights_type=structs.TYPES[weights.dtype], total_type=structs.TYPES[x.dtype], width=layer.width,
            hidden=layer.hidden,
        )  # fmt: skip
        self._address = ctypes.addressof(self._call)

    def call_between(
        self, x_1D: torch.Tensor, weights_1K: torch.Tensor, y_1D: torch.Tensor, chosen_K: ctypes.Array[ctypes.c_void_p]
    ) -> structs.CCall:
        """A call that always reads and writes there, for the experts that `chosen_K` points at. Keep this object."""
        assert self.takes(x_1D, weights_1K) and y_1D.dtype == x_1D.dtype and len(chosen_K) == len(self._tokens)
        call = structs.CCall.from_buffer_copy(self._call)
        call.x, call.weights, call.total = x_1D.data_ptr(), weights_1K.data_ptr(), y_1D.data_ptr()
        call.experts = ctypes.addressof(chosen_K)
        return call

    def takes(self, x_1D: torch.Tensor, weights_1K: torch.Tensor) -> bool:
        """They are of the types that were shown, and as many; contiguous."""
        return (
            (x_1D.dtype, weights_1K.dtype) == self._dtypes
            and weights_1K.numel() == len(self._tokens)
            and x_1D.is_contiguous()
            and weights_1K.is_contiguous()
        )

    def __call__(
        self, expert_ids: Sequence[int], experts: Sequence[ExpertWeights], x_1D: torch.Tensor, weights_1K: torch.Tensor
    ) -> torch.Tensor:
        """(1, D) in x's type. `takes` said True; the experts are not evicted meanwhile. Raises MemoryError."""
        y_1D, call, layer = torch.empty_like(x_1D), self._call, self.layer
        for choice, (expert_idx, weights) in enumerate(zip(expert_ids, experts, strict=True)):
            self._addresses[choice] = layer.expert_address(expert_idx, weights)
        call.x, call.weights, call.total = x_1D.data_ptr(), weights_1K.data_ptr(), y_1D.data_ptr()
        self._kernels.run_experts(self._address)
        return y_1D
