"""Experts and linears computed by the library, in RAM, with its own threads.

Every number depends on its own row alone, to the bit: not on other rows or experts of the call, nor on the number of
threads. Products are summed in float32, and rounded where `kernels.reference` rounds. Weights are multiplied as they
are stored, quantised ones with their scales in float32, so they are not first rounded to the model's type.

One call runs at a time; a second one, from another thread, waits. The caller's thread computes too, and Python's other
threads run meanwhile. Shapes: T tokens, K choices a token, S = T * K choices, D model width, F expert width.
"""

from __future__ import annotations

import ctypes
import itertools
import math as numbers
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from offmoe.core.errors import EngineClosedError, ResourceError
from offmoe.formats.dense import ExpertWeights
from offmoe.formats.quantised import QuantMatrix
from offmoe.kernels.activations import Activation, find_activation
from offmoe.kernels.cpu import structs
from offmoe.kernels.cpu.matrices import Weight, describe, unreadable
from offmoe.kernels.reference import ExpertMath

# (expert_idx, its weights, the tokens that its rows read, the choices that they write): lists of equal length
ExpertRows = tuple[int, ExpertWeights, Sequence[int], Sequence[int]]


@dataclass(slots=True)
class DescribedExpert:
    """One expert at one place in memory. `address` is that of its struct, which lives as long as this object."""

    place: int
    struct: structs.CExpert
    address: int
    keep: tuple[object, ...]


def describe_activation(activation: Activation) -> structs.CActivation:
    """The activation as the library reads it."""
    return structs.CActivation(
        curve=structs.CURVES[activation.kind], gated=int(activation.gated), interleaved=int(activation.interleaved),
        alpha=activation.alpha, gate_limit=numbers.inf if activation.gate_limit is None else activation.gate_limit,
        up_limit=numbers.inf if activation.up_limit is None else activation.up_limit, offset=activation.offset,
    )  # fmt: skip


class CpuLayer:
    """One layer's arithmetic for the library, and where its experts were last seen. Made by `CpuKernels.layer`."""

    def __init__(self, math: ExpertMath, activation: Activation, width: int, hidden: int) -> None:
        self.math, self.width, self.hidden = math, width, hidden
        self.activation = describe_activation(activation)
        self._described: dict[int, DescribedExpert] = {}

    def expert_address(self, expert_idx: int, weights: ExpertWeights) -> int:
        """Address of the expert's struct, until the expert lies elsewhere."""
        return self.describe(expert_idx, weights).address

    def describe(self, expert_idx: int, weights: ExpertWeights) -> DescribedExpert:
        """The expert's struct: made when the expert was not seen yet or lies elsewhere now."""
        first = weights.up[0]
        place = (first.codes if isinstance(first, QuantMatrix) else first).data_ptr()
        known = self._described.get(expert_idx)
        if known is None or known.place != place:
            known = self._described[expert_idx] = self._describe(expert_idx, weights, place)
        return known

    def _describe(self, expert_idx: int, weights: ExpertWeights, place: int) -> DescribedExpert:
        up, down = (
            [describe(part, transposed=self.math.transposed) for part in parts] for parts in (weights.up, weights.down)
        )
        ups, downs = ((structs.CMatrix * len(parts))(*(part.struct for part in parts)) for parts in (up, down))
        up_bias, down_bias = self.math.up_bias_EF, self.math.down_bias_ED
        struct = structs.CExpert(
            up=ups,
            down=downs,
            up_bias=None if up_bias is None else up_bias[expert_idx].data_ptr(),
            down_bias=None if down_bias is None else down_bias[expert_idx].data_ptr(),
            num_up=len(ups),
            num_down=len(downs),
        )
        return DescribedExpert(place, struct, ctypes.addressof(struct), (ups, downs))


class _Closed:
    """In the library's place."""

    def __getattr__(self, name: str) -> Callable[..., int]:
        raise EngineClosedError("the engine is closed; load the model again")


class CpuKernels:
    """An open library. Made by `load_cpu_kernels`; `close` ends its threads, as does the last reference going."""

    def __init__(self, library: ctypes.CDLL, level: str, level_idx: int, num_threads: int, spin_us: int) -> None:
        self.level, self.num_threads = level, num_threads
        self._library: ctypes.CDLL | _Closed = library
        self._handle = library.offmoe_open(level_idx, num_threads, spin_us)
        if not self._handle:
            raise MemoryError("no memory for the CPU kernels")
        self._finish = weakref.finalize(self, library.offmoe_close, self._handle)
        self._finish.atexit = False  # the threads end with the process

    def __repr__(self) -> str:
        return f"<CpuKernels {self}>"

    def __str__(self) -> str:
        return f"{self.level}, {self.num_threads} threads"

    @property
    def has_tiles(self) -> bool:
        """Whether matrices that lie row by row are multiplied with many rows in tiles, several at a time."""
        return self.level == "avx2"

    def close(self) -> None:
        """End the threads. No call is running; one that follows raises EngineClosedError."""
        self._library = _Closed()
        self._finish()

    def supports(self, math: ExpertMath, weights: ExpertWeights) -> str | None:
        """Why a layer with experts like `weights` is not computed here, or None."""
        if math.post_norm is not None:
            return "its experts' outputs are normed before they are summed"
        for bias in (math.up_bias_EF, math.down_bias_ED):
            if bias is not None and (bias.dtype != math.dtype or bias.device.type != "cpu" or bias.stride(1) != 1):
                return f"a bias is {bias.dtype} on {bias.device}, the layer computes in {math.dtype} on cpu"
        for parts in (weights.up, weights.down):
            for part in parts:
                reason = unreadable(part, math.dtype)
                if reason is not None:
                    return reason
            if len({_kind(part, transposed=math.transposed) for part in parts}) > 1:
                return "parts of one matrix are stored in different formats"
        return None if self._activation(math, weights) else "its activation is none of those known"

    def layer(self, math: ExpertMath, weights: ExpertWeights) -> CpuLayer:
        """The layer whose experts are like `weights`, for `experts`. `supports` said None."""
        activation = self._activation(math, weights)
        assert activation is not None, "not supported"
        return CpuLayer(math, activation, _outputs(weights.down, math), _inputs(weights.down, math))

    def experts(
        self, layer: CpuLayer, rows: Sequence[ExpertRows], x_TD: torch.Tensor, y_SD: torch.Tensor
    ) -> None:  # fmt: skip
        """Write every row's y to `y_SD` (the layer's type) at its choice; valid on return. Raises MemoryError.

        One token's, with their weighted sum, are `decode.CpuTokenExperts`.
        """
        begin = list(itertools.accumulate((len(tokens) for _, _, tokens, _ in rows), initial=0))
        addresses = [layer.expert_address(expert_idx, weights) for expert_idx, weights, _, _ in rows]
        tokens = list(itertools.chain.from_iterable(item[2] for item in rows))
        choices = list(itertools.chain.from_iterable(item[3] for item in rows))
        num_rows = begin[-1]
        assert x_TD.stride(-1) == 1 and y_SD.stride(-1) == 1 and y_SD.dtype == layer.math.dtype, f"{x_TD=} {y_SD=}"
        assert x_TD.shape[1] == y_SD.shape[1] == layer.width, f"{x_TD.shape=} {y_SD.shape=} {layer.width=}"
        assert not choices or (min(choices) >= 0 and max(choices) < len(y_SD)), f"{choices=}"
        assert not tokens or (min(tokens) >= 0 and max(tokens) < len(x_TD)), f"{tokens=}"
        arrays = (
            (ctypes.c_void_p * len(rows))(*addresses), (ctypes.c_int32 * len(begin))(*begin),
            (ctypes.c_int32 * num_rows)(*tokens), (ctypes.c_int32 * num_rows)(*choices),
        )  # fmt: skip
        experts_at, begin_at, tokens_at, choices_at = (ctypes.addressof(array) for array in arrays)
        call = structs.CCall(
            ctypes.addressof(layer.activation), experts_at, begin_at, tokens_at, choices_at, x_TD.data_ptr(),
            y_SD.data_ptr(), None, None, x_TD.stride(0) * x_TD.element_size(), y_SD.stride(0) * y_SD.element_size(), 0,
            len(rows), len(x_TD), 0, structs.TYPES[layer.math.dtype], structs.TYPES[x_TD.dtype], 0, 0, layer.width,
            layer.hidden,
        )  # fmt: skip
        self._call(self._library.offmoe_experts, ctypes.addressof(call), f"{num_rows} rows of experts")

    def run_experts(self, address: int) -> None:
        """A `structs.Call`; see decode.py. Raises MemoryError."""
        self._call(self._library.offmoe_experts, address, "a token's experts")

    def run_linear(self, address: int) -> None:
        """A `structs.Linear`; see decode.py. Raises MemoryError."""
        self._call(self._library.offmoe_linear, address, "a linear")

    def run_norm(self, address: int) -> None:
        """A `structs.Norm`; see decode.py. Raises MemoryError."""
        self._call(self._library.offmoe_norm, address, "a norm")

    def run_attend(self, address: int) -> None:
        """A `structs.Attend`; see decode.py. Raises MemoryError."""
        self._call(self._library.offmoe_attend, address, "a token's attention")

    def run_latent(self, address: int) -> None:
        """A `structs.Latent`; see latent.py. Raises MemoryError."""
        self._call(self._library.offmoe_latent, address, "a token's attention to latents")

    def run_layer(self, address: int) -> None:
        """A `structs.Layer`; see layer.py. Raises MemoryError."""
        self._call(self._library.offmoe_layer, address, "a token's layer")

    def run_program(self, address: int) -> int:
        """A `structs.Program`; see program.py. The number of the step whose experts are not all in RAM, or the end.
        Raises MemoryError.
        """
        stop: int = self._library.offmoe_program(self._handle, address)
        if stop < 0:
            raise _failure(-stop, "a token's layers")
        return stop

    def run_encode(self, address: int) -> None:
        """A `structs.Encode`; see quantise.py. Raises MemoryError."""
        self._call(self._library.offmoe_encode, address, "a matrix's codes")

    def run_unpack(self, address: int) -> None:
        """A `structs.Unpack`; see packing.py. Raises MemoryError."""
        self._call(self._library.offmoe_unpack, address, "a matrix's numbers")

    def run_pack(self, address: int) -> None:
        """A `structs.Pack`, by the calling thread, beside other calls; see packing.py."""
        self._library.offmoe_pack(self._handle, address)

    def run_route(self, address: int, logits: int, scores: int) -> None:
        """A `structs.Route` on one row of float32 logits; see layer.py. Raises MemoryError."""
        if code := self._library.offmoe_route(address, logits, scores):
            raise _failure(code, "a router's choice")

    def _call(self, function: Callable[..., int], address: int, what: str) -> None:
        if code := function(self._handle, address):
            raise _failure(code, what)

    def _activation(self, math: ExpertMath, weights: ExpertWeights) -> Activation | None:
        hidden = _inputs(weights.down, math)
        gated = sum(_outputs((part,), math) for part in weights.up) == 2 * hidden
        return find_activation(math.activate, hidden, gated=gated, device=torch.device("cpu"))


def _failure(code: int, what: str) -> MemoryError | ResourceError:
    """The error for a code of src/library.cpp: 1 for memory, any other for what else the system refused."""
    if code == 1:
        return MemoryError(f"no memory for {what}")
    return ResourceError(
        f"the system refuses the CPU kernels a lock or a thread for {what}; end other programs, or set "
        "OFFMOE_CPU_KERNELS=off to compute with PyTorch alone"
    )


def _kind(weight: Weight, *, transposed: bool) -> tuple[object, ...]:
    """Properties on which the preparation of x depends."""
    if isinstance(weight, QuantMatrix):
        return (weight.format,)
    return (weight.dtype, describe(weight, transposed=transposed).struct.transposed)


def _outputs(parts: tuple[Weight, ...], math: ExpertMath) -> int:
    return sum(part.shape[1 if math.transposed and isinstance(part, torch.Tensor) else 0] for part in parts)


def _inputs(parts: tuple[Weight, ...], math: ExpertMath) -> int:
    return parts[0].shape[0 if math.transposed and isinstance(parts[0], torch.Tensor) else 1]
