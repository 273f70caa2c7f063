"""Scaled positions of a GGUF file's metadata and factors, as the `rope_parameters` of a config. No torch.

Source: llama.cpp's `llm_graph_context` and `ggml_rope_ext` (angles are divided by the factors of `rope_freqs`, cosines
and sines multiplied by `rope.scaling.attn_factor`), transformers' `modeling_rope_utils`. Factors of frequencies have no
config of their own, and Llama 3's four numbers cannot be told from them: `frequencies` gives them for the model's
buffers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from offmoe.checkpoint.gguf.facts import GgufFacts
from offmoe.checkpoint.gguf.header import GgufHeader
from offmoe.core.errors import UnsupportedModelError

FREQUENCIES = "rope_freqs.weight"


@dataclass(frozen=True, slots=True)
class Frequencies:
    """Divisors of rotary frequencies, one for each (none: all 1), and the factor of cosines and sines."""

    factors: tuple[float, ...]
    attention: float


def rope(facts: GgufFacts, *, rotated: int) -> dict[str, Any]:
    """The parameters of a model that rotates `rotated` numbers of a head. Raises UnsupportedModelError for a scaling
    that is not read.
    """
    kind = facts.get("rope.scaling.type", "linear")
    factor = facts.real("rope.scaling.factor", facts.real("rope.scale_linear", 0.0)) or 1.0
    attention = facts.positive("rope.scaling.attn_factor", 1.0)
    original = facts.number("rope.scaling.original_context_length", 0)
    theta = facts.positive("rope.freq_base", 10000.0)
    lists = [facts.header.factors.get(f"rope_factors_{which}.weight") for which in ("short", "long")]
    if kind == "yarn":
        return _yarn(facts, theta, factor, original)
    if kind not in ("none", "linear", "longrope"):
        raise UnsupportedModelError(
            f"the GGUF file scales positions by {kind!r}, which is not read yet (none, linear, yarn and longrope are)"
        )
    if all(lists):
        short, long = (_checked(found or (), rotated) for found in lists)
        return {
            "rope_type": "longrope", "rope_theta": theta, "short_factor": short, "long_factor": long,
            "attention_factor": attention, "original_max_position_embeddings": original or facts.size("context_length"),
        }  # fmt: skip
    if kind == "longrope":
        raise UnsupportedModelError("the GGUF file says longrope without rope_factors_long and rope_factors_short")
    if frequencies := facts.header.factors.get(FREQUENCIES):
        _checked(frequencies, rotated)
    if factor != 1.0 and kind != "none":
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    return {"rope_type": "default", "rope_theta": theta}


def frequencies(header: GgufHeader) -> Frequencies | None:
    """The file's changes of the model's own angles, None without any."""
    facts = GgufFacts(header)
    factors = header.factors.get(FREQUENCIES, ())
    attention = facts.positive("rope.scaling.attn_factor", 1.0)
    if facts.get("rope.scaling.type") == "longrope":  # in the config
        attention = 1.0
    return Frequencies(factors, attention) if factors or attention != 1.0 else None


def _yarn(facts: GgufFacts, theta: float, factor: float, original: int) -> dict[str, Any]:
    facts.expect("rope.scaling.yarn_ext_factor", -1.0, 1.0)
    facts.expect("rope.scaling.yarn_attn_factor", -1.0, 1.0)
    return {
        "rope_type": "yarn", "rope_theta": theta, "factor": factor,
        "original_max_position_embeddings": original or facts.size("rope.scaling.original_context_length"),
        "beta_fast": facts.real("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": facts.real("rope.scaling.yarn_beta_slow", 1.0),
    }  # fmt: skip


def _checked(factors: tuple[float, ...], rotated: int) -> list[float]:
    if len(factors) != rotated // 2 or not all(0 <= value < float("inf") for value in factors):
        raise UnsupportedModelError(
            f"the GGUF file has {len(factors)} factors of frequencies (rope_freqs, rope_factors), {rotated // 2} "
            "numbers are needed"
        )
    return list(factors)
