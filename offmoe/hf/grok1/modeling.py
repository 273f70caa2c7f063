"""Grok-1's forward, after xai-org/grok-1 (model.py), with the parameter names of its Hugging Face conversion.

Four norms a layer: before and after attention, before and after the experts. Attention logits are capped by
30 tanh(x / 30). Experts are gated by gelu (the tanh form, jax.nn.gelu's default); two of eight by softmax over all
eight, not normalised again. Embeddings and logits have constant factors.

Shapes: B sequences, T tokens, S tokens seen, H heads, W head width, D model width, E experts, K experts a token.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from offmoe.hf.adapters.base import AdaptedExperts
from offmoe.hf.grok1.configuration import Grok1Config


class Grok1RMSNorm(nn.Module):
    """In float32; its weight is named `scale`."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., D)."""
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (self.scale.float() * normed).to(x.dtype)


class Grok1RotaryEmbedding(nn.Module):
    """Cosines and sines of the positions, both halves of a head alike."""

    inv_freq: torch.Tensor
    rope_type = "default"

    def __init__(self, config: Grok1Config) -> None:
        super().__init__()
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        self.register_buffer("inv_freq", config.rope_theta**-exponents, persistent=False)

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, T) positions -> two of (B, T, W), float32, whatever the type of `x`."""
        phase = position_ids.float()[..., None] * self.inv_freq.float()
        phase = torch.cat([phase, phase], dim=-1)
        return phase.cos(), phase.sin()


def _rotate(x_BHTW: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x_BHTW.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return (x_BHTW * cos + torch.cat([-second, first], dim=-1) * sin).to(x_BHTW.dtype)


class Grok1Attention(nn.Module):
    """Grouped queries, capped logits, softmax in float32."""

    def __init__(self, config: Grok1Config, layer_idx: int) -> None:
        super().__init__()
        width, head = config.hidden_size, config.head_dim
        self.layer_idx, self.head_dim = layer_idx, head
        self.multiplier, self.cap = config.attn_output_multiplier, config.max_attn_value
        self.q_proj = nn.Linear(width, config.num_attention_heads * head, bias=False)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * head, bias=False)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * head, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * head, width, bias=False)

    def forward(
        self, x_BTD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, visible_BTS: torch.Tensor,
        past_key_values: Any,
    ) -> torch.Tensor:  # fmt: skip
        """`visible_BTS` (B, 1, T, S) says who sees whom."""
        lead = x_BTD.shape[:2]
        query, key, value = (
            linear(x_BTD).view(*lead, -1, self.head_dim).transpose(1, 2)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        logits = (query @ key.transpose(-1, -2)).float() * self.multiplier
        logits = self.cap * torch.tanh(logits / self.cap)
        weights = logits.masked_fill(~visible_BTS, torch.finfo(torch.float32).min).softmax(dim=-1).to(query.dtype)
        answer: torch.Tensor = self.o_proj((weights @ value).transpose(1, 2).reshape(*lead, -1))
        return answer


class Grok1MoeBlock(nn.Module):
    """Router and experts; the experts' weights stay on disk."""

    def __init__(self, config: Grok1Config) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = AdaptedExperts(
            num_experts=config.num_experts, width=config.hidden_size, expert_width=config.intermediate_size,
            top_k=self.top_k, act_fn=ACT2FN["gelu_pytorch_tanh"], dtype=torch.get_default_dtype(),
        )  # fmt: skip

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """The chosen experts' sum, weighted by their shares among all experts."""
        x_TD = x_BTD.reshape(-1, x_BTD.shape[-1])
        weights_TK, ids_TK = self.gate(x_TD).float().softmax(dim=-1).topk(self.top_k, dim=-1)
        y: torch.Tensor = self.experts(x_TD, ids_TK, weights_TK.to(x_TD.dtype)).view(x_BTD.shape)
        return y


class Grok1DecoderLayer(nn.Module):
    """Attention and experts, each between two norms, each added to what came in."""

    def __init__(self, config: Grok1Config, layer_idx: int) -> None:
        super().__init__()
        self.attn = Grok1Attention(config, layer_idx)
        self.moe_block = Grok1MoeBlock(config)
        self.pre_attn_norm = Grok1RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attn_norm = Grok1RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.pre_moe_norm = Grok1RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_moe_norm = Grok1RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x_BTD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, visible_BTS: torch.Tensor,
        past_key_values: Any,
    ) -> torch.Tensor:  # fmt: skip
        """(B, T, D) -> (B, T, D)."""
        attended = self.attn(self.pre_attn_norm(x_BTD), cos, sin, visible_BTS, past_key_values)
        x_BTD = x_BTD + self.post_attn_norm(attended)
        moved: torch.Tensor = x_BTD + self.post_moe_norm(self.moe_block(self.pre_moe_norm(x_BTD)))
        return moved


class Grok1PreTrainedModel(PreTrainedModel):
    """The family's properties that transformers asks for."""

    config_class = Grok1Config
    base_model_prefix = "model"
    _no_split_modules: ClassVar[list[str]] = ["Grok1DecoderLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]


class Grok1Model(Grok1PreTrainedModel):
    """Embeddings, layers and the last norm."""

    def __init__(self, config: Grok1Config) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Grok1DecoderLayer(config, idx) for idx in range(config.num_hidden_layers)])
        self.norm = Grok1RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = Grok1RotaryEmbedding(config)
        self.post_init()

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None,
        past_key_values: Any,
    ) -> torch.Tensor:  # fmt: skip
        """(B, T) ids -> (B, T, D). `attention_mask` (B, S): 0 for padding."""
        num_new = input_ids.shape[1]
        num_past = past_key_values.get_seq_length() if past_key_values is not None else 0
        rows = torch.arange(num_past, num_past + num_new, device=input_ids.device)
        visible = (torch.arange(num_past + num_new, device=input_ids.device) <= rows[:, None])[None, None]
        if attention_mask is not None:
            visible = visible & attention_mask[:, None, None, : num_past + num_new].bool()
        x_BTD = self.embed_tokens(input_ids) * self.config.embedding_multiplier_scale
        cos, sin = self.rotary_emb(x_BTD, rows[None] if position_ids is None else position_ids)
        for layer in self.layers:
            x_BTD = layer(x_BTD, cos, sin, visible, past_key_values)
        normed: torch.Tensor = self.norm(x_BTD)
        return normed


class Grok1ForCausalLM(Grok1PreTrainedModel, GenerationMixin):
    """The model with its head, which is the embedding when `tie_word_embeddings`."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: Grok1Config) -> None:
        super().__init__(config)
        self.model = Grok1Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None, past_key_values: Any = None, use_cache: bool | None = None,
        logits_to_keep: int = 0, **_: Any,
    ) -> MoeCausalLMOutputWithPast:  # fmt: skip
        """Logits (B, T, V), of the last `logits_to_keep` tokens where that is not 0."""
        if past_key_values is None and (self.config.use_cache if use_cache is None else use_cache):
            past_key_values = DynamicCache(config=self.config)
        x_BTD = self.model(input_ids, attention_mask, position_ids, past_key_values)
        logits = self.lm_head(x_BTD[:, -logits_to_keep:]) * self.config.output_multiplier_scale
        return MoeCausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)
