"""The length of a model's context."""

from __future__ import annotations

from transformers import PreTrainedModel


def longest_context(model: PreTrainedModel) -> int | None:
    """Tokens that the model was made for; None where its config does not say."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return longest if isinstance(longest, int) and longest > 0 else None
