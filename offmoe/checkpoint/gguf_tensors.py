"""A GGUF file's tensors under the names that the published safetensors have, so that all that follows is the same.

Stacked experts become one entry an expert. What llama.cpp's converter changed is said here and undone when it is read:
DerivedEntry has the ways. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from offmoe.base.errors import CheckpointError
from offmoe.checkpoint.derived import DerivedEntry, StoredTensor
from offmoe.checkpoint.gguf import GgufHeader, GgufTensor
from offmoe.checkpoint.quant_format import BLOCK_KINDS, QuantFormat
from offmoe.checkpoint.quantised import QuantEntry
from offmoe.checkpoint.tensor_entry import TensorEntry

_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ATTENTION = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "post_attention_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "attn_q_a": "self_attn.q_a_proj", "attn_q_b": "self_attn.q_b_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm", "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm", "attn_kv_b": "self_attn.kv_b_proj",
}  # fmt: skip
_FEED_FORWARD = {
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "ffn_gate_inp": "mlp.gate",
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj", "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
}  # fmt: skip
_EXPERTS = {"gate": "mlp.experts.*.gate_proj", "up": "mlp.experts.*.up_proj", "down": "mlp.experts.*.down_proj"}
# Where an architecture's published names differ from DeepSeek's.
_OWN_NAMES: dict[str, dict[str, str]] = {
    "llama": {"ffn_gate_inp": "block_sparse_moe.gate"},
    "gpt-oss": {"ffn_gate_inp": "mlp.router", "post_attention_norm": "post_attention_layernorm"},
    "qwen2moe": {
        f"ffn_{part}_shexp": f"mlp.shared_expert.{part}_proj" for part in ("gate", "up", "down")
    } | {"ffn_gate_inp_shexp": "mlp.shared_expert_gate"},
}  # fmt: skip
_OWN_EXPERTS = {
    "llama": {
        "gate": "block_sparse_moe.experts.*.w1", "up": "block_sparse_moe.experts.*.w3",
        "down": "block_sparse_moe.experts.*.w2",
    }
}  # fmt: skip
_IN_LAYER = re.compile(r"blk\.(\d+)\.([a-z_]+)(?:\.(\d+))?(?:\.(weight|bias))?")
# Tables that transformers computes itself.
_IGNORED = ("rope_freqs.weight", "attn_rot_embd")


def gguf_tensors(header: GgufHeader, config: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """All tensors by published name. `config` is `gguf_config`'s. Raises CheckpointError naming one of another kind."""
    found: dict[str, StoredTensor] = {}
    halves: dict[str, GgufTensor] = {}
    for name, tensor in header.tensors.items():
        if any(part in name for part in _IGNORED) or _layer_idx(name) >= config["num_hidden_layers"]:
            continue
        if _is_half(name):
            halves[name] = tensor
            continue
        for entry in _entries(name, tensor, header.architecture, config):
            if entry.name in found:
                raise CheckpointError(f"the GGUF file has {entry.name!r} twice; download it again")
            found[entry.name] = entry
    for joined in _joined(halves, config):
        found[joined.name] = joined
    return found


def _layer_idx(name: str) -> int:
    match = _IN_LAYER.fullmatch(name)
    return int(match[1]) if match else -1


def _is_half(name: str) -> bool:
    return name.endswith((".attn_k_b.weight", ".attn_v_b.weight", ".ffn_gate_exps.bias", ".ffn_up_exps.bias"))


def _entries(name: str, tensor: GgufTensor, architecture: str, config: Mapping[str, Any]) -> Iterator[StoredTensor]:
    stem, _, suffix = name.rpartition(".")
    if stem in _OUTSIDE:
        yield _entry(tensor, f"{_OUTSIDE[stem]}.{suffix}")
        return
    match = _IN_LAYER.fullmatch(name)
    if match is None:
        raise _unknown(name, architecture)
    prefix, leaf, number, suffix = f"model.layers.{match[1]}.", match[2], match[3], match[4] or "weight"
    experts = _OWN_EXPERTS.get(architecture, _EXPERTS)
    part = leaf.removeprefix("ffn_").removesuffix("_exps")
    if leaf.endswith("_exps") and part in experts:
        if suffix == "bias":
            yield _entry(tensor, f"{prefix}mlp.experts.{part}_proj_bias")
            return
        if architecture == "gpt-oss":  # published stacked
            yield _entry(tensor, f"{prefix}mlp.experts.{part}_proj")
            return
        yield from _split(tensor, prefix + experts[part] + ".weight")
    elif number is not None and part in experts:
        yield _entry(tensor, prefix + experts[part].replace("*", number) + ".weight")
    elif leaf == "exp_probs_b":
        yield _entry(tensor, f"{prefix}mlp.gate.e_score_correction_bias")
    elif leaf == "attn_sinks":
        yield _entry(tensor, f"{prefix}self_attn.sinks")
    else:
        known = _ATTENTION | _FEED_FORWARD | _OWN_NAMES.get(architecture, {})
        if leaf not in known:
            raise _unknown(name, architecture)
        yield _changed(_entry(tensor, f"{prefix}{known[leaf]}.{suffix}"), leaf, architecture, config)


def _changed(entry: TensorEntry | QuantEntry, leaf: str, architecture: str, config: Mapping[str, Any]) -> StoredTensor:
    if architecture == "llama" and leaf in ("attn_q", "attn_k"):
        heads = config["num_attention_heads" if leaf == "attn_q" else "num_key_value_heads"]
        if not heads or entry.shape[0] % (2 * heads):
            raise CheckpointError(f"the GGUF file has {entry.shape[0]} rows in {entry.name!r} for {heads} heads")
        return DerivedEntry(name=entry.name, shape=entry.shape, how="unrotate", sources=(entry,), heads=heads)
    if leaf == "ffn_gate_inp_shexp" and len(entry.shape) == 1:
        return DerivedEntry(name=entry.name, shape=(1, *entry.shape), how="row", sources=(entry,))
    return entry


def _split(tensor: GgufTensor, pattern: str) -> Iterator[TensorEntry | QuantEntry]:
    """One entry an expert of a stacked tensor."""
    if len(tensor.shape) != 3:
        raise CheckpointError(f"{tensor.entry.name!r} has shape {list(tensor.shape)}, experts are stacked in three")
    num_experts, entry = tensor.shape[0], tensor.entry
    size = entry.num_bytes // num_experts
    for idx in range(num_experts):
        one = replace(entry, shape=entry.shape[1:], start=entry.start + idx * size, num_bytes=size)
        yield _entry(GgufTensor(kind=tensor.kind, shape=tensor.shape[1:], entry=one), pattern.replace("*", str(idx)))


def _entry(tensor: GgufTensor, name: str) -> TensorEntry | QuantEntry:
    codes = replace(tensor.entry, name=name)
    if tensor.kind is None:
        return codes
    kind = next(known for known in BLOCK_KINDS if known == tensor.kind)
    form = QuantFormat(kind=kind, group=BLOCK_KINDS[kind].num_columns, scale_dtype="U8")
    return QuantEntry(name=name, shape=tensor.shape, format=form, codes=codes, scales=None)


def _joined(halves: Mapping[str, GgufTensor], config: Mapping[str, Any]) -> Iterator[DerivedEntry]:
    """The tensors that are stored as two."""
    for name, first in halves.items():
        stem, _, suffix = name.rpartition(".")
        base, _, leaf = stem.rpartition(".")
        other = {"attn_k_b": "attn_v_b", "ffn_gate_exps": "ffn_up_exps"}.get(leaf)
        if other is None:
            continue
        second = halves.get(f"{base}.{other}.{suffix}")
        if second is None:
            raise CheckpointError(f"the GGUF file has {name!r} without {base}.{other}.{suffix}; download it again")
        prefix = base.replace("blk.", "model.layers.")
        sources = (_entry(first, name), _entry(second, second.entry.name))
        if leaf == "attn_k_b":
            yield _latent(f"{prefix}.self_attn.kv_b_proj.weight", sources, config)
        else:
            shape = (*first.shape[:-1], 2 * first.shape[-1])
            name_of_pairs = f"{prefix}.mlp.experts.gate_up_proj_bias"
            yield DerivedEntry(name=name_of_pairs, shape=shape, how="pairs", sources=sources)


def _latent(
    name: str, sources: tuple[TensorEntry | QuantEntry, TensorEntry | QuantEntry], config: Mapping[str, Any]
) -> DerivedEntry:
    keys, values = sources
    heads, rank = config["num_attention_heads"], config["kv_lora_rank"]
    expected = ((heads, rank, config["qk_nope_head_dim"]), (heads, config["v_head_dim"], rank))
    if (keys.shape, values.shape) != expected:
        raise CheckpointError(
            f"{keys.name!r} is {list(keys.shape)} and {values.name!r} {list(values.shape)}, the metadata say "
            f"{list(expected[0])} and {list(expected[1])}; download the file again"
        )
    shape = (heads * (config["qk_nope_head_dim"] + config["v_head_dim"]), rank)
    return DerivedEntry(name=name, shape=shape, how="latent", sources=sources, heads=heads)


def _unknown(name: str, architecture: str) -> CheckpointError:
    return CheckpointError(
        f"the GGUF file has a tensor {name!r}, which {architecture} models are not known to have; use the safetensors "
        "version of the model"
    )
