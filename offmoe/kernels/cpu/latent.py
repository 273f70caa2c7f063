"""One token's attention to cached latents (DeepSeek's) in one call of the library.

Shapes: H heads, N numbers of a head's key that are made of the latent, R numbers that are rotated, C the latent's
width, V a head's value, S rows of a cache.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Literal

import torch

from offmoe.kernels.cpu import structs
from offmoe.kernels.cpu.decode import NORM_KINDS, CpuNorm
from offmoe.kernels.cpu.kernels import CpuKernels
from offmoe.kernels.cpu.matrices import describe, unreadable

# Which numbers turn with each other and where they go; see `Rotation` in abi.h.
Rotation = Literal["halves", "apart", "pairs"]
ROTATIONS: dict[Rotation, int] = {"halves": 0, "apart": 1, "pairs": 2}
_MOST_ROTATED = 512


@dataclass(frozen=True, kw_only=True)
class LatentShape:
    """Properties that stay from token to token. `scale` multiplies scores."""

    num_heads: int
    key_width: int
    rotated: int
    latent: int
    value_width: int
    scale: float
    dtype: torch.dtype

    def fits(self, weight: torch.Tensor, norm: CpuNorm) -> bool:
        """`weight`, (H * (N + V), C), and the latents' norm are of these sizes, and the kernels read them."""
        sizes = (self.num_heads, self.key_width, self.rotated, self.latent, self.value_width)
        return (
            min(sizes) > 0
            and self.rotated % 2 == 0
            and self.rotated <= _MOST_ROTATED
            and weight.shape == (self.num_heads * (self.key_width + self.value_width), self.latent)
            and weight.dtype == norm.weight_D.dtype == self.dtype
            and weight.is_contiguous()
            and unreadable(weight, self.dtype) is None
            and norm.weight_D.numel() == self.latent
        )


class CpuLatentAttention:
    """Attention of one token of one layer. Serves one thread at a time."""

    def __init__(self, kernels: CpuKernels, shape: LatentShape, norm: CpuNorm, weight: torch.Tensor) -> None:
        """`weight`: from latents to each head's key and value, (H * (N + V), C). `shape.fits(weight, norm)` is True."""
        self._kernels, self.shape = kernels, shape
        weight_HXC = weight.view(shape.num_heads, -1, shape.latent)
        keys = [describe(matrix[: shape.key_width].t()).struct for matrix in weight_HXC]
        values = [describe(matrix[shape.key_width :]).struct for matrix in weight_HXC]
        matrices = [(structs.CMatrix * shape.num_heads)(*some) for some in (keys, values)]
        self._keep = (norm, weight, matrices)
        self._call = structs.CLatent(
            norm=norm.weight_D.data_ptr(), keys=ctypes.addressof(matrices[0]), values=ctypes.addressof(matrices[1]),
            num_heads=shape.num_heads, key_width=shape.key_width, rotated=shape.rotated, latent=shape.latent,
            value_width=shape.value_width, eps=norm.eps, scale=shape.scale, norm_kind=NORM_KINDS[norm.kind],
            type=structs.TYPES[shape.dtype],
        )  # fmt: skip
        self._address = ctypes.addressof(self._call)

    def takes(self, latents: torch.Tensor, rotated: torch.Tensor) -> bool:
        """A cache's latents (1, 1, S, C) and rotated keys (1, 1, S, R) lie side by side."""
        size, shape = latents.element_size(), self.shape
        return (
            latents.dtype == rotated.dtype == shape.dtype
            and latents.shape[:-1] == rotated.shape[:-1] == (1, 1, latents.shape[-2])
            and (latents.shape[-1], rotated.shape[-1]) == (shape.latent, shape.rotated)
            and rotated.data_ptr() == latents.data_ptr() + shape.latent * size
            and latents.stride()[-2:] == rotated.stride()[-2:]
            and latents.stride(-1) == 1
            and latents.stride(-2) >= shape.latent + shape.rotated
        )

    def call_between(self, query: torch.Tensor, compressed: torch.Tensor, output: torch.Tensor) -> structs.CLatent:
        """A call that always reads and writes these rows; its cache, angles and rotation are to be set. Keep it."""
        shape = self.shape
        assert query.numel() == shape.num_heads * (shape.key_width + shape.rotated), f"{query.shape=}"
        assert compressed.numel() == shape.latent + shape.rotated, f"{compressed.shape=}"
        assert output.numel() == shape.num_heads * shape.value_width, f"{output.shape=}"
        call = structs.CLatent.from_buffer_copy(self._call)
        call.query, call.compressed, call.output = query.data_ptr(), compressed.data_ptr(), output.data_ptr()
        return call

    def __call__(
        self, query: torch.Tensor, compressed: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
        latents: torch.Tensor, *, rotation: Rotation,
    ) -> torch.Tensor:  # fmt: skip
        """The heads' outputs, (H * V), of one token.

        `query`, H * (N + R) numbers, and `compressed`, C + R, are the projections' contiguous outputs; `cos` and `sin`,
        float32, the angles of its position, one for each pair. `latents` are the cache's, of S rows, the last of which
        is written here, as is the rotated key behind it; `takes` said True. Raises MemoryError.
        """
        call, shape = self._call, self.shape
        assert query.numel() == shape.num_heads * (shape.key_width + shape.rotated), f"{query.shape=}"
        assert compressed.numel() == shape.latent + shape.rotated, f"{compressed.shape=}"
        assert cos.numel() == sin.numel() == shape.rotated // 2 and cos.dtype == sin.dtype == torch.float32
        output = query.new_empty(shape.num_heads * shape.value_width)
        call.query, call.compressed, call.output = query.data_ptr(), compressed.data_ptr(), output.data_ptr()
        call.cos, call.sin, call.rotation = cos.data_ptr(), sin.data_ptr(), ROTATIONS[rotation]
        call.cache, call.num_rows = latents.data_ptr(), latents.shape[-2]
        call.row_bytes = latents.stride(-2) * latents.element_size()
        self._kernels.run_latent(self._address)
        return output
