"""Latent attention (DeepSeek's) that reads the cached latents as they are, for few tokens.

transformers expands the latents of the whole context to every head's keys and values, in each layer and for each token:
with 4,096 tokens of context and DeepSeek-V2-Lite's shape that is 104 ms a layer, and 134 MB. Keys and values are linear
in the latent, so their matrix may as well be multiplied to the query before, and to the result after: 2.2 ms. The
arithmetic is that of the DeepSeek-V2 paper (2.1.2); results are equal up to rounding. For more than
`MAX_ABSORBED_TOKENS` tokens at once expanding is less work.

All families of transformers call `expand_kv` for it, and hand what it returns to the attention function unread. So
here it returns the latents, and the attention function (attention/sdpa.py) decides.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from offmoe.attention.token import token_attention
from offmoe.hf.masks import mask_sees_all
from offmoe.kernels.row_blocks import BLOCK_TOKENS, active_blocks
from offmoe.memory.shape import MAX_ABSORBED_TOKENS

_CHECKED_TOKENS, _CHECKED_CONTEXT = 3, 9


def find_latent_attention(module: torch.nn.Module) -> LatentAttention | None:
    """That of a module which caches latents; from now on its `expand_kv` returns (rotated keys, latents)."""
    kv_b: Any = getattr(module, "kv_b_proj", None)
    if not hasattr(type(module), "expand_kv") or type(kv_b) is not torch.nn.Linear:
        return None
    if kv_b._parameters["bias"] is not None:
        return None
    latent = LatentAttention(module)
    module.__dict__["expand_kv"] = lambda latents, rotated: (rotated, latents)
    return latent


class LatentAttention:
    """Attention of one module: B sequences, T queries, S cached tokens, H heads of key width N + R and value width V.

    Latents (B, 1, S, C), rotated keys (B, 1, S, R), queries (B, H, T, N + R).
    """

    def __init__(self, module: Any) -> None:
        self._module = module
        self._key_width, self._value_width = int(module.qk_nope_head_dim), int(module.v_head_dim)
        self.absorbs = False

    def expand(self, rotated: torch.Tensor, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all heads by the module's own code: (B, H, S, N + R) and (B, H, S, V)."""
        module = self._module
        if active_blocks() is None:
            keys, values = type(module).expand_kv(module, latents, rotated)
            return keys, values
        # All tokens of the context, whatever part of them is read now.
        pieces = zip(latents.split(BLOCK_TOKENS, dim=-2), rotated.split(BLOCK_TOKENS, dim=-2), strict=True)
        parts = [type(module).expand_kv(module, *piece) for piece in pieces]
        return torch.cat([keys for keys, _ in parts], dim=2), torch.cat([values for _, values in parts], dim=2)

    def takes(self, query: torch.Tensor, mask: torch.Tensor | None) -> bool:
        """These queries are better served from the latents. Several need a mask that says what they see."""
        few = query.shape[2] == 1 or (mask is not None and query.shape[2] <= MAX_ABSORBED_TOKENS)
        return self.absorbs and few

    def attend(
        self, query: torch.Tensor, rotated: torch.Tensor, latents: torch.Tensor, mask: torch.Tensor | None,
        scaling: float | None,
    ) -> torch.Tensor:  # fmt: skip
        """The heads' results, (B, T, H, V)."""
        keys_HNC, values_HVC = self._matrices(latents.shape[-1])
        plain, turned = query.split([self._key_width, query.shape[-1] - self._key_width], dim=-1)
        query = torch.cat([torch.matmul(plain, keys_HNC), turned], dim=-1)
        states = _joined(latents, rotated)
        if query.shape[2] == 1:
            mixed = self._mix_one(query, states, mask, scaling, value_width=latents.shape[-1])
        else:
            mixed = functional.scaled_dot_product_attention(
                query, states, states, attn_mask=mask, scale=scaling, enable_gqa=True
            )
        return torch.matmul(mixed[..., : latents.shape[-1]], values_HVC.transpose(1, 2)).transpose(1, 2).contiguous()

    def _mix_one(
        self, query: torch.Tensor, states: torch.Tensor, mask: torch.Tensor | None, scaling: float | None, *,
        value_width: int,
    ) -> torch.Tensor:  # fmt: skip
        """The states (1, 1, S, C + R) as each head (1, H, 1, C + R) weighs them, at least their first `value_width`."""

        def fused() -> torch.Tensor:  # the heads as so many queries of one head
            mixed = functional.scaled_dot_product_attention(
                query.transpose(1, 2), states, states, attn_mask=mask, scale=scaling
            )
            return mixed[..., :value_width]

        one, values = token_attention(self._module), states[..., :value_width]
        if one is not None and one.takes(query, states, values, None) and mask_sees_all(mask):
            return one.attend(query, states, values, scaling, fused).transpose(1, 2)
        return fused().transpose(1, 2)

    def check(self, agree: Any) -> None:
        """Absorb from now on, if a few random tokens give what the module's own way gives. Its weights are loaded."""
        weight = self._module.kv_b_proj.weight
        if weight.is_meta:
            return
        random = torch.Generator().manual_seed(0)
        heads, rotated_width = self._matrices(weight.shape[1])[0].shape[0], int(self._module.qk_rope_head_dim)

        def states(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=random).to(weight)

        query = states(1, heads, _CHECKED_TOKENS, self._key_width + rotated_width)
        latents, rotated = (states(1, 1, _CHECKED_CONTEXT, width) for width in (weight.shape[1], rotated_width))
        shape = (1, 1, _CHECKED_TOKENS, _CHECKED_CONTEXT)
        mask = torch.ones(shape, dtype=torch.bool, device=weight.device).tril(_CHECKED_CONTEXT - _CHECKED_TOKENS)
        scaling = query.shape[-1] ** -0.5
        keys, values = self.expand(rotated, latents)
        expected = functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scaling)
        last = self.attend(query[:, :, -1:], rotated, latents, None, scaling)
        whole = self.attend(query, rotated, latents, mask, scaling)
        expected = expected.transpose(1, 2)
        self.absorbs = agree(whole, expected) and agree(last, expected[:, -1:])

    def _matrices(self, latent_width: int) -> tuple[torch.Tensor, torch.Tensor]:
        both = self._module.kv_b_proj.weight.view(-1, self._key_width + self._value_width, latent_width)
        return both[:, : self._key_width], both[:, self._key_width :]


def _joined(latents: torch.Tensor, rotated: torch.Tensor) -> torch.Tensor:
    """(B, 1, S, C + R): a view where the cache holds both side by side, as kv/cache.py does."""
    width = latents.shape[-1]
    plain = type(latents) is torch.Tensor and not torch.compiler.is_compiling()  # others may have no storage
    if not plain or latents.untyped_storage().data_ptr() != rotated.untyped_storage().data_ptr():
        return torch.cat([latents, rotated], dim=-1)
    adjacent = rotated.storage_offset() == latents.storage_offset() + width and rotated.stride() == latents.stride()
    if not adjacent or latents.stride(-2) < width + rotated.shape[-1]:
        return torch.cat([latents, rotated], dim=-1)
    return latents.as_strided((*latents.shape[:-1], width + rotated.shape[-1]), latents.stride())
