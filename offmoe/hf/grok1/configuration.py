"""Grok-1's config.json, as the Hugging Face conversions (hpcai-tech/grok-1) write it. Defaults are the 314B model's."""

from __future__ import annotations

from transformers import PreTrainedConfig


class Grok1Config(PreTrainedConfig):
    """Widths, counts and the five constants of the architecture (xai-org/grok-1, run.py and model.py)."""

    model_type = "grok-1"
    keys_to_ignore_at_inference = ("past_key_values",)

    vocab_size: int = 131072
    hidden_size: int = 6144
    intermediate_size: int = 32768
    num_hidden_layers: int = 64
    num_attention_heads: int = 48
    num_key_value_heads: int = 8
    attn_output_multiplier: float = 0.08838834764831845
    max_attn_value: float = 30.0
    max_position_embeddings: int = 8192
    embedding_multiplier_scale: float = 78.38367176906169
    output_multiplier_scale: float = 0.5773502691896257
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = True
    num_experts_per_tok: int = 2
    num_experts: int = 8
    initializer_range: float = 0.02

    @property
    def head_dim(self) -> int:
        """Width of a head. Raises ValueError when the heads do not divide the width."""
        if self.hidden_size % self.num_attention_heads or self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"{self.num_attention_heads} heads over {self.num_key_value_heads} key heads do not divide "
                f"hidden_size {self.hidden_size}"
            )
        return self.hidden_size // self.num_attention_heads
