"""Attention of one token to cached latents (DeepSeek's) by the CPU kernels, between its projections.

torch multiplies the matrix between heads and latents at a small part of the memory's speed (1.4 ms a layer in
DeepSeek-V2-Lite's shape), and what is around it are some forty operations. A module is taken where its own code does
nothing but project, norm, rotate, append to the cache, expand, attend and project. Which numbers are rotated with which
is seen by comparing the first tokens, computed both ways.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from offmoe.kernels.cpu.decode import CpuNorm
from offmoe.kernels.cpu.latent import CpuLatentAttention, LatentShape, Rotation
from offmoe.models.kv_cache import Buffers
from offmoe.models.native import NativeModules, find_norm
from offmoe.models.native_token import ATTENTIONS, Masks, TokenStep, calls_only

_PROJECTIONS = ("kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
_SIZES = ("num_heads", "qk_nope_head_dim", "qk_rope_head_dim", "kv_lora_rank", "v_head_dim")
_ROTATES = {"apply_rotary_pos_emb", "apply_rotary_pos_emb_interleave", "apply_rotary_emb"}
_KNOWN_CALLS = {
    "q_proj", "q_a_proj", "q_b_proj", "q_a_layernorm", "kv_a_proj_with_mqa", "kv_a_layernorm", "o_proj", "expand_kv",
    "view", "transpose", "reshape", "contiguous", "split", "cat", "to", "update", "get_interface",
    "attention_interface",
}  # fmt: skip


def swap_latents(native: NativeModules, model: nn.Module) -> None:
    """Swap the attention to latents of every layer that is understood. Linears and norms are swapped already."""
    plain: dict[type[nn.Module], bool] = {}
    masks, angles = Masks(), _Angles()
    for module in model.modules():
        if not native.kernels.attends_to_latents or not hasattr(type(module), "expand_kv"):
            continue
        if type(module) not in plain:
            plain[type(module)] = calls_only(type(module), _KNOWN_CALLS, _ROTATES)
        attention = _make_attention(native, module) if plain[type(module)] and "forward" not in vars(module) else None
        if attention is not None:
            native.swap(module, LatentStep(native, module, attention, masks, angles).forward, ATTENTIONS)


def _make_attention(native: NativeModules, module: Any) -> CpuLatentAttention | None:
    linears = [getattr(module, name, None) for name in _PROJECTIONS]
    sizes: list[Any] = [getattr(module, name, None) for name in _SIZES]
    scale = getattr(module, "scaling", None)
    norm: CpuNorm | None = find_norm(native.kernels, getattr(module, "kv_a_layernorm", nn.Identity()))
    if not all(isinstance(linear, nn.Linear) for linear in linears) or norm is None or not isinstance(scale, float):
        return None
    kv_b = module.kv_b_proj
    if not all(type(size) is int for size in sizes) or kv_b.bias is not None or kv_b.weight.is_meta:
        return None
    weight = kv_b.weight.detach()
    num_heads, key_width, rotated, latent, value_width = sizes
    shape = LatentShape(
        num_heads=num_heads, key_width=key_width, rotated=rotated, latent=latent, value_width=value_width, scale=scale,
        dtype=weight.dtype,
    )  # fmt: skip
    return CpuLatentAttention(native.kernels, shape, norm, weight) if shape.fits(weight, norm) else None


class _Angles:
    """All layers are given the same angles: they are made ready for the kernels once a token."""

    def __init__(self) -> None:
        self._last: object = None
        self._found: tuple[torch.Tensor, torch.Tensor] | None = None

    def of(self, given: Any, num_pairs: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Cosines and sines, float32, of so many pairs: of complex numbers, or of two tensors for each pair's first
        number and maybe, behind them, for its second.
        """
        if given is not self._last:
            self._last, self._found = given, _as_float32(given, num_pairs)
        return self._found


def _as_float32(given: Any, num_pairs: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    if isinstance(given, torch.Tensor):
        if not given.is_complex() or given.numel() != num_pairs:
            return None
        pairs = torch.view_as_real(given).flatten(end_dim=-2).float()
        return pairs[:, 0].contiguous(), pairs[:, 1].contiguous()
    if (
        not isinstance(given, tuple)
        or len(given) != 2
        or {angle.numel() for angle in given} - {num_pairs, 2 * num_pairs}
    ):
        return None
    cos, sin = (angle.flatten()[:num_pairs].float().contiguous() for angle in given)
    return cos, sin


class LatentStep(TokenStep):
    """The `forward` of one attention module that caches latents."""

    def __init__(
        self, native: NativeModules, module: Any, attention: CpuLatentAttention, masks: Masks, angles: _Angles
    ) -> None:
        super().__init__(native, module, masks)
        self.attention, self._angles = attention, angles
        self._rotation: Rotation | None = None

    def run(self, hidden: torch.Tensor, angles: Any, rows: Buffers) -> torch.Tensor:
        """As of TokenStep."""
        module, ready = self.module, self._angles.of(angles, self.attention.shape.rotated // 2)
        assert ready is not None and self._rotation is not None, f"{angles=}"
        if getattr(module, "q_proj", None) is not None:
            query = module.q_proj(hidden)
        else:
            query = module.q_b_proj(module.q_a_layernorm(module.q_a_proj(hidden)))
        compressed = module.kv_a_proj_with_mqa(hidden)
        heads = self.attention(query, compressed, *ready, rows[0], rotation=self._rotation)
        output: torch.Tensor = module.o_proj(heads.view(1, 1, -1))
        return output

    def ways(self, hidden: torch.Tensor, angles: Any, rows: Buffers) -> Iterator[None]:
        """As of TokenStep."""
        fitting = hidden.dtype == self.attention.shape.dtype and self.attention.takes(*rows)
        if not fitting or self._angles.of(angles, self.attention.shape.rotated // 2) is None:
            return
        kinds: tuple[Rotation, ...] = ("pairs",) if isinstance(angles, torch.Tensor) else ("apart", "halves")
        for kind in kinds if self._rotation is None else (self._rotation,):
            self._rotation = kind
            yield
