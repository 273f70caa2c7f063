"""The description of one GGUF architecture, and the parts that many of them share. No torch.

Names are those of the published safetensors, so that all that follows is the same. Source: the tensor names of the gguf
package, and llama.cpp's converters, https://github.com/ggml-org/llama.cpp/tree/master/conversion
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from offmoe.checkpoint.derived import DerivationStep, DerivedEntry, StoredTensor
from offmoe.checkpoint.gguf.facts import GgufFacts
from offmoe.checkpoint.quantised import QuantEntry
from offmoe.checkpoint.tensor_entry import TensorEntry
from offmoe.core.errors import CheckpointError

Stored = TensorEntry | QuantEntry
Undo = Callable[[Stored, Mapping[str, Any]], StoredTensor]
Join = Callable[[str, tuple[Stored, ...], Mapping[str, Any]], StoredTensor]

# llama.cpp's expert_gating_func.
SOFTMAX, SIGMOID, SOFTMAX_OF_CHOSEN = 1, 2, 3

OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Recipe that turns files of one architecture into a config and tensors of a transformers model.

    `config` gives the part of the config that is its own. `modules` maps a tensor's name in a layer to the module whose
    weight (or, for those in `biased`, bias) it is, `parameters` whole names, `outside` those of no layer. `experts` are
    the published names of one expert's matrices, `stacked` the modules' own names for files whose published tensors
    hold all experts. `undo` takes back what the converter did to a tensor, `joins` makes one of several that are stored
    apart. `gating` and `norm` are what `expert_gating_func` and `expert_weights_norm` may say where `config` does not
    read them. `is_partial`: a head may be rotated in part. `is_whole`: `config` gives all of the config but for tokens.
    """

    config: Callable[[GgufFacts], dict[str, Any]]
    modules: Mapping[str, str]
    experts: Mapping[str, str] = field(default_factory=dict)
    stacked: Mapping[str, str] = field(default_factory=dict)
    parameters: Mapping[str, str] = field(default_factory=dict)
    outside: Mapping[str, str] = field(default_factory=lambda: OUTSIDE)
    layer: str = "model.layers."
    biased: frozenset[str] = frozenset()
    undo: Mapping[str, Undo] = field(default_factory=dict)
    joins: Mapping[tuple[str, ...], tuple[str, Join]] = field(default_factory=dict)
    gating: tuple[int, ...] = (0, SOFTMAX)
    norm: tuple[bool, ...] = ()
    is_partial: bool = False
    is_whole: bool = False


ATTENTION = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
}  # fmt: skip
QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
LATENT = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_q_a": "self_attn.q_a_proj",
    "attn_q_b": "self_attn.q_b_proj", "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa", "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj", "attn_output": "self_attn.o_proj",
}  # fmt: skip
# Both names are in use for the norm before the experts.
FFN_NORM = {"ffn_norm": "post_attention_layernorm"}
POST_ATTENTION_NORM = {"post_attention_norm": "post_attention_layernorm"}


def mlp(module: str, suffix: str = "") -> dict[str, str]:
    """Gate, up and down projections of `module`, for tensors that end in `suffix`."""
    return {f"ffn_{part}{suffix}": f"{module}.{part}_proj" for part in ("gate", "up", "down")}


def experts_of(module: str) -> dict[str, str]:
    """Published names of the matrices of one expert (`*`)."""
    return {part: f"{module}.*.{part}_proj.weight" for part in ("gate", "up", "down")}


MIXTRAL_EXPERTS = {
    part: f"block_sparse_moe.experts.*.{name}.weight" for part, name in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
}
QKV = frozenset({"attn_q", "attn_k", "attn_v"})


def stacked_of(module: str) -> dict[str, str]:
    """Names of the stacked matrices of an experts module."""
    return {part: f"{module}.{part}_proj" for part in ("gate", "up", "down")} | {"gate_up": f"{module}.gate_up_proj"}


def derived(entry: Stored, *steps: DerivationStep, shape: tuple[int, ...] | None = None) -> DerivedEntry:
    """`entry` after `steps`."""
    return DerivedEntry(name=entry.name, shape=shape or entry.shape, steps=steps, sources=(entry,))


def unrotate(entry: Stored, config: Mapping[str, Any]) -> StoredTensor:
    """Rows of queries or keys (by name) whose rotated pairs lie side by side."""
    heads = config["num_attention_heads" if ".q_proj" in entry.name else "num_key_value_heads"]
    if not heads or entry.shape[0] % (2 * heads):
        raise CheckpointError(f"the GGUF file has {entry.shape[0]} rows in {entry.name!r} for {heads} heads")
    return derived(entry, DerivationStep("unrotate", (heads,)))


def as_row(entry: Stored, config: Mapping[str, Any]) -> StoredTensor:
    """A matrix of one row that is stored without its dimension."""
    return derived(entry, DerivationStep("reshape"), shape=(1, *entry.shape)) if len(entry.shape) == 1 else entry


def less_one(entry: Stored, config: Mapping[str, Any]) -> StoredTensor:
    """A norm's weights that are stored with 1 added."""
    return derived(entry, DerivationStep("less_one"))


def as_convolution(entry: Stored, config: Mapping[str, Any]) -> StoredTensor:
    """A depthwise convolution, (channels, 1, width), that is stored without its middle dimension."""
    width = entry.shape[-1]
    return derived(entry, DerivationStep("reshape"), shape=(math.prod(entry.shape) // width, 1, width))


def logarithm(entry: Stored, config: Mapping[str, Any]) -> StoredTensor:
    """A_log, stored as -exp(A_log)."""
    return derived(entry, DerivationStep("log"))


def rows(name: str, sources: tuple[Stored, ...], config: Mapping[str, Any]) -> StoredTensor:
    """Matrices that the model has in one, one below the other."""
    shape = (sum(source.shape[0] for source in sources), *sources[0].shape[1:])
    return DerivedEntry(name=name, shape=shape, steps=(DerivationStep("rows"),), sources=sources)


def pairs(name: str, sources: tuple[Stored, ...], config: Mapping[str, Any]) -> StoredTensor:
    """Biases of gate and up that take turns in the model."""
    shape = (*sources[0].shape[:-1], 2 * sources[0].shape[-1])
    return DerivedEntry(name=name, shape=shape, steps=(DerivationStep("pairs"),), sources=sources)


def latent(name: str, sources: tuple[Stored, ...], config: Mapping[str, Any]) -> StoredTensor:
    """kv_b_proj from its keys, turned, and its values."""
    keys, values = sources
    heads, rank = config["num_attention_heads"], config["kv_lora_rank"]
    expected = ((heads, rank, config["qk_nope_head_dim"]), (heads, config["v_head_dim"], rank))
    if (keys.shape, values.shape) != expected:
        raise CheckpointError(
            f"{keys.name!r} is {list(keys.shape)} and {values.name!r} {list(values.shape)}, the metadata say "
            f"{list(expected[0])} and {list(expected[1])}; get another conversion of the model"
        )
    shape = (heads * (config["qk_nope_head_dim"] + config["v_head_dim"]), rank)
    return DerivedEntry(name=name, shape=shape, steps=(DerivationStep("latent"),), sources=sources)


LATENT_JOINS: dict[tuple[str, ...], tuple[str, Join]] = {
    ("attn_k_b.weight", "attn_v_b.weight"): ("self_attn.kv_b_proj.weight", latent)
}
