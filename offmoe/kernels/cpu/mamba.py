"""One token through a Mamba-2 mixer by the library: convolution, state space, gate, norm.

Shapes: H heads, G groups of heads that share keys and queries, W a head's width, S a state's size,
C = H * W + 2 * G * S channels of the convolution.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from offmoe.kernels.cpu import structs
from offmoe.kernels.cpu.delta import states_fit

MOST_TAPS = 8


@dataclass(frozen=True, kw_only=True)
class MambaShape:
    """Sizes of a mixer, the same for all tokens."""

    num_heads: int
    num_groups: int
    width: int
    size: int
    taps: int
    dtype: torch.dtype

    @property
    def values(self) -> int:
        """H * W."""
        return self.num_heads * self.width

    @property
    def channels(self) -> int:
        """C."""
        return self.values + 2 * self.num_groups * self.size


class CpuMamba:
    """The weights of one mixer beside its projections. `conv_CT`: (C, taps); `norm_V`: of H * W numbers.

    `log_rate_H`, `time_bias_H`: a state decays by e^(-e^log_rate * softplus(time + time_bias)). `skip_H`: the part of a
    value that passes by the state.
    """

    def __init__(
        self, shape: MambaShape, conv_CT: torch.Tensor, conv_bias_C: torch.Tensor | None, norm_V: torch.Tensor,
        log_rate_H: torch.Tensor, time_bias_H: torch.Tensor, skip_H: torch.Tensor, *, eps: float,
    ) -> None:  # fmt: skip
        assert conv_CT.shape == (shape.channels, shape.taps) and conv_CT.is_contiguous(), f"{conv_CT.shape=}"
        assert conv_CT.dtype == norm_V.dtype == shape.dtype and norm_V.numel() == shape.values, f"{norm_V.shape=}"
        assert conv_bias_C is None or (conv_bias_C.dtype, conv_bias_C.numel()) == (shape.dtype, shape.channels)
        assert log_rate_H.numel() == time_bias_H.numel() == skip_H.numel() == shape.num_heads, f"{skip_H.shape=}"
        assert shape.num_heads % shape.num_groups == 0 and 0 < shape.taps <= MOST_TAPS, f"{shape=}"
        self.shape = shape
        rate_H = log_rate_H.float().exp().contiguous()
        # The module rounds the bias to the type of the time first.
        bias_H, skip_H = time_bias_H.to(shape.dtype).float().contiguous(), skip_H.float().contiguous()
        self._keep = (conv_CT, conv_bias_C, norm_V, rate_H, bias_H, skip_H)
        self._call = structs.CMamba(
            conv=conv_CT.data_ptr(), conv_bias=None if conv_bias_C is None else conv_bias_C.data_ptr(),
            rate=rate_H.data_ptr(), time_bias=bias_H.data_ptr(), skip=skip_H.data_ptr(), norm=norm_V.data_ptr(),
            num_heads=shape.num_heads, num_groups=shape.num_groups, width=shape.width, size=shape.size,
            taps=shape.taps, eps=eps, type=structs.TYPES[shape.dtype],
        )  # fmt: skip

    def call_between(self, x: torch.Tensor, y: torch.Tensor) -> structs.CMamba:
        """A call that always reads H * W + C + H numbers and writes H * W; its states are to be set. Keep it."""
        shape = self.shape
        assert x.numel() == shape.values + shape.channels + shape.num_heads and y.numel() == shape.values, f"{x.shape=}"
        assert x.dtype == y.dtype == shape.dtype and x.is_contiguous() and y.is_contiguous(), f"{x.dtype=}"
        call = structs.CMamba.from_buffer_copy(self._call)
        call.input, call.output = x.data_ptr(), y.data_ptr()
        return call

    def takes(self, conv_state: torch.Tensor, state: torch.Tensor) -> bool:
        """Running states, (1, C, taps) and float32 (1, H, W, S), that can be changed in place."""
        shape = self.shape
        sizes = (shape.num_heads, shape.width, shape.size)
        return states_fit(conv_state, state, (shape.channels, shape.taps), sizes, shape.dtype)
