"""One token through a gated delta net by the library: convolution, delta rule on the running states, norm, gate.

Shapes: G key heads, H value heads (a multiple of G), K a key's width, V a value's, C = 2 * G * K + H * V channels.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from offmoe.kernels.cpu import structs

MOST_TAPS = 64


@dataclass(frozen=True, kw_only=True)
class DeltaShape:
    """Sizes of a gated delta net, the same for all tokens."""

    num_keys: int
    num_values: int
    key_width: int
    value_width: int
    taps: int
    dtype: torch.dtype

    @property
    def channels(self) -> int:
        """C."""
        return 2 * self.num_keys * self.key_width + self.num_values * self.value_width


@dataclass(frozen=True, kw_only=True)
class DeltaInput:
    """Place of one input in a projection's row: the first key head's numbers begin at `begin`, the next one's `stride`
    numbers further.
    """

    row: torch.Tensor
    begin: int
    stride: int


class CpuDelta:
    """The weights of one layer beside its projections. `conv_CT`: (C, taps); `norm_V`: of each head's output.

    `log_rate_H` and `decay_bias_H`: a state decays by e^(-e^log_rate * softplus(decay + decay_bias)).
    """

    def __init__(
        self, shape: DeltaShape, conv_CT: torch.Tensor, norm_V: torch.Tensor, log_rate_H: torch.Tensor,
        decay_bias_H: torch.Tensor, *, eps: float,
    ) -> None:  # fmt: skip
        assert conv_CT.shape == (shape.channels, shape.taps) and conv_CT.is_contiguous(), f"{conv_CT.shape=}"
        assert conv_CT.dtype == norm_V.dtype == shape.dtype and norm_V.numel() == shape.value_width, f"{norm_V.shape=}"
        assert log_rate_H.numel() == decay_bias_H.numel() == shape.num_values, f"{log_rate_H.shape=}"
        assert shape.num_values % shape.num_keys == 0 and shape.taps <= MOST_TAPS, f"{shape=}"
        self.shape = shape
        rate_H, bias_H = log_rate_H.float().exp().contiguous(), decay_bias_H.float().contiguous()
        self._keep = (conv_CT, norm_V, rate_H, bias_H)
        self._call = structs.CDelta(
            conv=conv_CT.data_ptr(), rate=rate_H.data_ptr(), decay_bias=bias_H.data_ptr(), norm=norm_V.data_ptr(),
            num_keys=shape.num_keys, num_values=shape.num_values, key_width=shape.key_width,
            value_width=shape.value_width, taps=shape.taps, eps=eps, type=structs.TYPES[shape.dtype],
        )  # fmt: skip

    def call_between(self, inputs: dict[str, DeltaInput], output: torch.Tensor) -> structs.CDelta:
        """A call that always reads `inputs` (query, key, value, gate, beta, decay) and writes (H * V) numbers; its
        states are to be set. Keep it.
        """
        assert output.numel() == self.shape.num_values * self.shape.value_width, f"{output.shape=}"
        call = structs.CDelta.from_buffer_copy(self._call)
        call.output = output.data_ptr()
        for name, given in inputs.items():
            assert given.row.dtype == self.shape.dtype and given.row.is_contiguous(), f"{name=}"
            setattr(call, name, given.row.data_ptr() + given.begin * given.row.element_size())
            setattr(call, f"{name}_stride", given.stride)
        return call

    def takes(self, conv_state: torch.Tensor, state: torch.Tensor) -> bool:
        """Running states, (1, C, taps) and float32 (1, H, K, V), that can be changed in place."""
        shape = self.shape
        sizes = (shape.num_values, shape.key_width, shape.value_width)
        return states_fit(conv_state, state, (shape.channels, shape.taps), sizes, shape.dtype)


def states_fit(
    conv_state: torch.Tensor, state: torch.Tensor, conv_sizes: tuple[int, ...], sizes: tuple[int, ...],
    dtype: torch.dtype,
) -> bool:  # fmt: skip
    """Whether states of one sequence have these sizes, and can be changed in place: of `dtype`, and float32."""
    return (
        conv_state.shape == (1, *conv_sizes) and conv_state.dtype == dtype and conv_state.is_contiguous()
        and state.shape == (1, *sizes) and state.dtype == torch.float32 and state.is_contiguous()
    )  # fmt: skip


def set_states(call: structs.CDelta | structs.CMamba, conv_state: torch.Tensor, state: torch.Tensor) -> None:
    """The layer's running states, which the call changes; `takes` said True."""
    call.conv_state, call.state = ctypes.c_void_p(conv_state.data_ptr()), ctypes.c_void_p(state.data_ptr())
