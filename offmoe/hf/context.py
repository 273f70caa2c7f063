"""The length of a model's context."""

from __future__ import annotations

from transformers import PreTrainedModel

from offmoe.checkpoint.context_limit import context_limit


def longest_context(model: PreTrainedModel) -> int | None:
    """Tokens that the model was made for; None where its config does not say."""
    return context_limit(model.config.get_text_config().to_dict())
