"""Tensors that published checkpoints hold and that generating text does not need: one table, by name. No torch.

The loader looks here only for tensors that no parameter takes, and refuses those that are not listed. The planner
leaves listed ones out of its sums.
"""

from __future__ import annotations

import re

# Tables that are computed at load, heads that guess tokens ahead, what other engines and trainers keep.
_ALWAYS = {
    "rotary tables": r"(^|\.)((original_)?inv_freq|(cos|sin)_cached)$",
    "position ids": r"(^|\.)position_ids$",
    "heads that guess tokens ahead": r"(^|\.)mtp([._]|$)",
    "scales of a quantised KV cache": r"\.[kv]_scale$",
    "state of a training framework": r"\._extra_state$",
}
# Parts of multimodal models, for a model class that has text alone.
_TOWERS = {
    "the image encoder": (
        r"(^|\.)(visual|vision_\w+|image_newline|image_\w+|multi_modal_projector|mm_projector|embed_vision|sam_model|"
        r"view_seperator|patch_embed\w*)(\.|$)"
    ),
    "the audio encoder": r"(^|\.)(audio_\w+|embed_audio|speech_\w+)(\.|$)",
    "the speech decoder": r"^(talker|token2wav|code2wav)(\.|$)",
}
_LAYER = re.compile(r"\blayers\.(\d+)\.")


def needless_kind(name: str) -> str | None:
    """The kind of a tensor that no model class of transformers loads, or None."""
    return _first(_ALWAYS, name)


def tower_kind(name: str) -> str | None:
    """The part of a multimodal model that a tensor belongs to, beside its language model; or None."""
    return _first(_TOWERS, name)


def is_beyond(name: str, num_layers: int) -> bool:
    """True for a layer after the last: DeepSeek-V3 and its kin keep a block there that guesses tokens ahead."""
    found = _LAYER.search(name)
    return bool(num_layers and found and int(found[1]) >= num_layers)


def _first(table: dict[str, str], name: str) -> str | None:
    return next((kind for kind, pattern in table.items() if re.search(pattern, name)), None)
