"""One token through a gated short convolution (LFM2) by the library.

Shapes: C channels.
"""

from __future__ import annotations

import ctypes

import torch

from offmoe.kernels.cpu import structs

MOST_TAPS = 64


class CpuShortConv:
    """The convolution of one layer between its projections. `conv_CT`: (C, taps)."""

    def __init__(self, conv_CT: torch.Tensor, bias_C: torch.Tensor | None) -> None:
        assert conv_CT.dim() == 2 and conv_CT.is_contiguous() and conv_CT.shape[1] <= MOST_TAPS, f"{conv_CT.shape=}"
        assert bias_C is None or (bias_C.dtype == conv_CT.dtype and bias_C.numel() == len(conv_CT)), f"{bias_C=}"
        self.conv_CT, self._bias_C = conv_CT, bias_C
        self._call = structs.CShortConv(
            conv=conv_CT.data_ptr(), bias=None if bias_C is None else bias_C.data_ptr(), channels=conv_CT.shape[0],
            taps=conv_CT.shape[1], type=structs.TYPES[conv_CT.dtype],
        )  # fmt: skip

    def call_between(self, x: torch.Tensor, y: torch.Tensor) -> structs.CShortConv:
        """A call that always reads (3 * C) numbers and writes (C); its state is to be set. Keep it."""
        channels = len(self.conv_CT)
        assert x.numel() == 3 * channels and y.numel() == channels, f"{x.shape=} {y.shape=}"
        assert x.dtype == y.dtype == self.conv_CT.dtype and x.is_contiguous() and y.is_contiguous(), f"{x.dtype=}"
        call = structs.CShortConv.from_buffer_copy(self._call)
        call.input, call.output = x.data_ptr(), y.data_ptr()
        return call

    def takes(self, state: torch.Tensor) -> bool:
        """A running state, (1, C, taps), that can be changed in place."""
        conv = self.conv_CT
        return state.shape == (1, *conv.shape) and state.dtype == conv.dtype and state.is_contiguous()


def set_state(call: structs.CShortConv, state: torch.Tensor) -> None:
    """The layer's running state, which the call changes; `takes` said True."""
    call.state = ctypes.c_void_p(state.data_ptr())
