"""Rotary positions that depend on how long the whole text is: kinds `dynamic` and `longrope`.

transformers' rotary modules take the length from the largest position of a call. A prompt that comes in pieces, or a
reply that grows past the length the model was first trained on, must be told it in another way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from offmoe.hf.internals import cache_name

_KINDS = frozenset({"dynamic", "longrope"})


def longest_with_same_cos_sin(model: PreTrainedModel) -> int | None:
    """Tokens up to which rotary angles do not depend on how many there are; None where they never do."""
    config = model.config.get_text_config()
    found = getattr(config, "rope_parameters", None) or {}
    kinds = [kind for kind in (found, *found.values()) if isinstance(kind, dict)]
    dependent = [kind for kind in kinds if kind.get("rope_type") in _KINDS]
    if not dependent:
        return None
    own = getattr(config, "original_max_position_embeddings", None)
    lengths = [
        kind.get("original_max_position_embeddings") or own or config.max_position_embeddings for kind in dependent
    ]
    return min(int(length) for length in lengths)


@contextmanager
def cos_sin_of(model: PreTrainedModel, length: int) -> Iterator[None]:
    """Let rotary modules turn every token as one of a text of `length` tokens, in whatever pieces it comes.

    So a prompt in pieces gets the angles that transformers gives to a whole one. The last position is put behind those
    of each call, and its angles are taken off again.
    """

    def with_last(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        positions = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
        longer = torch.cat([positions, torch.full_like(positions[..., :1], length - 1)], dim=-1)
        if "position_ids" in kwargs:
            return args, kwargs | {"position_ids": longer}
        return (args[0], longer, *args[2:]), kwargs

    def without_last(module: Any, args: tuple[Any, ...], angles: Any) -> Any:
        return tuple(part[..., :-1, :] for part in angles)

    longest = longest_with_same_cos_sin(model)
    rotary = [] if longest is None or length <= longest else _rotary_modules(model)
    hooks = [module.register_forward_pre_hook(with_last, with_kwargs=True) for module in rotary]
    hooks += [module.register_forward_hook(without_last) for module in rotary]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def starts_over(model: PreTrainedModel, ids: torch.Tensor, cache: DynamicCache | None) -> bool:
    """True where the model's own `generate` drops `cache` before `ids` (1, S), and reads all of them again.

    Phi-3.5-MoE does, once a reply grows past its original length; the model's own method is asked. Where none does,
    cached keys keep the angles they were made with, as in transformers.
    """
    name = cache_name(model)
    prepared = model.prepare_inputs_for_generation(
        ids, attention_mask=torch.ones_like(ids), next_sequence_length=1, use_cache=True, **{name: cache}
    )
    return cache is not None and prepared.get(name) is None


def _rotary_modules(model: PreTrainedModel) -> list[torch.nn.Module]:
    return [module for module in model.modules() if _kinds(getattr(module, "rope_type", None)) & _KINDS]


def _kinds(rope_type: object) -> set[object]:
    """One kind, or one for each type of layer."""
    return set(rope_type.values()) if isinstance(rope_type, dict) else {rope_type}
