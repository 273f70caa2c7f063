"""The published shapes of five MoE models: their `config.json`, and the name and shape of every tensor.

Knows names and numbers only: no torch, no files. Everything is as the model's authors published it, with one
exception: gpt-oss is published as MXFP4 blocks and scales; here its experts take the bfloat16 stacked form that
transformers' `save_pretrained` gives (in by out, all experts of a layer in one tensor).

Shape letters: V vocabulary, D model width, F expert width, E experts, H heads, G key/value heads, A head width.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from benchlib.errors import ScriptError

Config = dict[str, Any]

EMBEDDING_DEVIATION = 0.24
OUTPUT_NAME = re.compile(r"\.(o_proj|down_proj|w2)(\.weight)?$")  # projections back into the model width


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One tensor of a checkpoint. Norm weights are `ones`, all others are drawn with `deviation`."""

    name: str
    shape: tuple[int, ...]
    ones: bool = False
    deviation: float = 0.0

    @property
    def num_elements(self) -> int:
        """How many numbers the tensor holds."""
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True, kw_only=True)
class Family:
    """A published model: its configuration, the sizes that make it tiny, and the tensors of one layer."""

    config: Config
    tiny: Config
    layer_tensors: Callable[[Config, int, str], Iterator[TensorSpec]]


def build_config(like: str, *, num_layers: int, vocab_size: int, dtype: str, overrides: Config | None = None) -> Config:
    """The published configuration of `like` with another depth, vocabulary and dtype.

    `overrides` replaces further keys (the tests' tiny sizes). Raises `ScriptError` for a name not in `FAMILIES`.
    """
    if like not in FAMILIES:
        raise ScriptError(f"unknown model {like!r}; known: {', '.join(sorted(FAMILIES))}")
    config = COMMON | FAMILIES[like].config | (overrides or {})
    config |= {"num_hidden_layers": num_layers, "vocab_size": vocab_size, "dtype": dtype}
    if "layer_types" in config:
        config["layer_types"] = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(num_layers)]
    return config


def tensor_specs(like: str, config: Config) -> Iterator[TensorSpec]:
    """Every tensor of the checkpoint, in model order, each with the deviation to draw it with.

    `initializer_range` for all would leave every token's state to the mean that attention adds: on six layers of
    qwen3-30b-a3b 72% of a token's experts were its predecessor's, and LRU over 25% of the experts hit 99%. Projections
    back into the model width are therefore drawn smaller with depth (as GPT-2 does), and embeddings larger. Then that
    checkpoint repeats 27%, and LRU over 12.5 / 25 / 37.5% of its experts hits 39 / 64 / 80%. Published traces of the
    model itself give 61 / 81 / 91%: a bench on these weights does not flatter caches.
    """
    deviation = config["initializer_range"]
    for spec in _plain_specs(like, config):
        if "embed_tokens" in spec.name:
            yield replace(spec, deviation=EMBEDDING_DEVIATION)
        elif OUTPUT_NAME.search(spec.name):
            yield replace(spec, deviation=deviation / math.sqrt(2 * config["num_hidden_layers"]))
        else:
            yield replace(spec, deviation=deviation)


def _plain_specs(like: str, config: Config) -> Iterator[TensorSpec]:
    """Every tensor in model order, without deviations."""
    vocab_size, width = config["vocab_size"], config["hidden_size"]
    yield TensorSpec(name="model.embed_tokens.weight", shape=(vocab_size, width))
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        yield TensorSpec(name=prefix + "input_layernorm.weight", shape=(width,), ones=True)
        yield TensorSpec(name=prefix + "post_attention_layernorm.weight", shape=(width,), ones=True)
        yield from FAMILIES[like].layer_tensors(config, layer, prefix)
    yield TensorSpec(name="model.norm.weight", shape=(width,), ones=True)
    yield TensorSpec(name="lm_head.weight", shape=(vocab_size, width))


def _grouped_attention(config: Config, prefix: str, *, bias: bool = False) -> Iterator[TensorSpec]:
    """q, k, v and output projections of grouped-query attention."""
    heads, kv_heads, width = (
        config["num_attention_heads"], config["num_key_value_heads"], config["hidden_size"],
    )  # fmt: skip
    head_dim = config.get("head_dim") or width // heads
    shapes = {
        "q_proj": (heads * head_dim, width),
        "k_proj": (kv_heads * head_dim, width),
        "v_proj": (kv_heads * head_dim, width),
        "o_proj": (width, heads * head_dim),
    }
    for name, shape in shapes.items():
        yield TensorSpec(name=f"{prefix}self_attn.{name}.weight", shape=shape)
        if bias:
            yield TensorSpec(name=f"{prefix}self_attn.{name}.bias", shape=shape[:1])


def _query_key_norms(prefix: str, query: int, key: int) -> Iterator[TensorSpec]:
    yield TensorSpec(name=prefix + "self_attn.q_norm.weight", shape=(query,), ones=True)
    yield TensorSpec(name=prefix + "self_attn.k_norm.weight", shape=(key,), ones=True)


def _gated_mlp(prefix: str, width: int, inner: int, names: tuple[str, str, str]) -> Iterator[TensorSpec]:
    """A gated feed-forward block; `names` are its gate, up and down projections."""
    gate, up, down = names
    yield TensorSpec(name=f"{prefix}{gate}.weight", shape=(inner, width))
    yield TensorSpec(name=f"{prefix}{up}.weight", shape=(inner, width))
    yield TensorSpec(name=f"{prefix}{down}.weight", shape=(width, inner))


PROJ = ("gate_proj", "up_proj", "down_proj")


def _routed_experts(prefix: str, num_experts: int, width: int, inner: int) -> Iterator[TensorSpec]:
    """The router and one gated block per expert, as Qwen, OLMoE and DeepSeek name them."""
    yield TensorSpec(name=prefix + "gate.weight", shape=(num_experts, width))
    for expert in range(num_experts):
        yield from _gated_mlp(f"{prefix}experts.{expert}.", width, inner, PROJ)


def _qwen3_layer(config: Config, layer: int, prefix: str) -> Iterator[TensorSpec]:
    yield from _grouped_attention(config, prefix)
    yield from _query_key_norms(prefix, config["head_dim"], config["head_dim"])
    yield from _routed_experts(
        prefix + "mlp.", config["num_experts"], config["hidden_size"], config["moe_intermediate_size"]
    )


def _olmoe_layer(config: Config, layer: int, prefix: str) -> Iterator[TensorSpec]:
    width = config["hidden_size"]
    key_width = width // config["num_attention_heads"] * config["num_key_value_heads"]
    yield from _grouped_attention(config, prefix)
    yield from _query_key_norms(prefix, width, key_width)
    yield from _routed_experts(prefix + "mlp.", config["num_experts"], width, config["intermediate_size"])


def _mixtral_layer(config: Config, layer: int, prefix: str) -> Iterator[TensorSpec]:
    width, num_experts = config["hidden_size"], config["num_local_experts"]
    yield from _grouped_attention(config, prefix)
    block = prefix + "block_sparse_moe."
    yield TensorSpec(name=block + "gate.weight", shape=(num_experts, width))
    for expert in range(num_experts):
        experts = f"{block}experts.{expert}."
        yield from _gated_mlp(experts, width, config["intermediate_size"], ("w1", "w3", "w2"))


def _deepseek_layer(config: Config, layer: int, prefix: str) -> Iterator[TensorSpec]:
    heads, width = config["num_attention_heads"], config["hidden_size"]
    latent, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
    plain, value = config["qk_nope_head_dim"], config["v_head_dim"]
    attention = prefix + "self_attn."
    yield TensorSpec(name=attention + "q_proj.weight", shape=(heads * (plain + rope), width))
    yield TensorSpec(name=attention + "kv_a_proj_with_mqa.weight", shape=(latent + rope, width))
    yield TensorSpec(name=attention + "kv_a_layernorm.weight", shape=(latent,), ones=True)
    yield TensorSpec(name=attention + "kv_b_proj.weight", shape=(heads * (plain + value), latent))
    yield TensorSpec(name=attention + "o_proj.weight", shape=(width, heads * value))
    if layer < config["first_k_dense_replace"]:
        yield from _gated_mlp(prefix + "mlp.", width, config["intermediate_size"], PROJ)
        return
    inner = config["moe_intermediate_size"]
    yield from _routed_experts(prefix + "mlp.", config["n_routed_experts"], width, inner)
    shared = prefix + "mlp.shared_experts."
    yield from _gated_mlp(shared, width, inner * config["n_shared_experts"], PROJ)


def _gpt_oss_layer(config: Config, layer: int, prefix: str) -> Iterator[TensorSpec]:
    width, inner, num_experts = (
        config["hidden_size"], config["intermediate_size"], config["num_local_experts"],
    )  # fmt: skip
    yield from _grouped_attention(config, prefix, bias=True)
    yield TensorSpec(name=prefix + "self_attn.sinks", shape=(config["num_attention_heads"],))
    block = prefix + "mlp."
    yield TensorSpec(name=block + "router.weight", shape=(num_experts, width))
    yield TensorSpec(name=block + "router.bias", shape=(num_experts,))
    yield TensorSpec(name=block + "experts.gate_up_proj", shape=(num_experts, width, 2 * inner))
    yield TensorSpec(name=block + "experts.gate_up_proj_bias", shape=(num_experts, 2 * inner))
    yield TensorSpec(name=block + "experts.down_proj", shape=(num_experts, inner, width))
    yield TensorSpec(name=block + "experts.down_proj_bias", shape=(num_experts, width))


COMMON: Config = {
    "attention_dropout": 0.0, "attention_bias": False, "bos_token_id": 0, "eos_token_id": 0,
    "hidden_act": "silu", "initializer_range": 0.02, "pad_token_id": None, "tie_word_embeddings": False,
    "use_cache": True,
}  # fmt: skip

TINY_GROUPED: Config = {
    "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip

FAMILIES: dict[str, Family] = {
    "qwen3-30b-a3b": Family(
        config={
            "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe",
            "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
            "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
            "intermediate_size": 6144, "norm_topk_prob": True, "decoder_sparse_step": 1,
            "mlp_only_layers": [], "router_aux_loss_coef": 0.001, "output_router_logits": False,
            "rms_norm_eps": 1e-6, "rope_theta": 1e6, "rope_scaling": None,
            "max_position_embeddings": 40960, "use_sliding_window": False, "sliding_window": None,
        },
        tiny=TINY_GROUPED | {"head_dim": 32, "num_experts": 16, "num_experts_per_tok": 4,
                             "moe_intermediate_size": 32, "intermediate_size": 96},
        layer_tensors=_qwen3_layer,
    ),
    "mixtral-8x7b": Family(
        config={
            "architectures": ["MixtralForCausalLM"], "model_type": "mixtral",
            "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
            "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 14336,
            "output_router_logits": False, "router_aux_loss_coef": 0.02, "rms_norm_eps": 1e-5,
            "rope_theta": 1e6, "max_position_embeddings": 32768, "sliding_window": None,
        },
        tiny=TINY_GROUPED | {"num_local_experts": 8, "intermediate_size": 96},
        layer_tensors=_mixtral_layer,
    ),
    "olmoe": Family(
        config={
            "architectures": ["OlmoeForCausalLM"], "model_type": "olmoe",
            "hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 16,
            "num_experts": 64, "num_experts_per_tok": 8, "intermediate_size": 1024,
            "norm_topk_prob": False, "output_router_logits": False, "router_aux_loss_coef": 0.01,
            "clip_qkv": None, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "rope_scaling": None,
            "max_position_embeddings": 4096,
        },
        tiny=TINY_GROUPED | {"num_experts": 16, "num_experts_per_tok": 4, "intermediate_size": 32},
        layer_tensors=_olmoe_layer,
    ),
    "deepseek-v2-lite": Family(
        config={
            "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2",
            "hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 16,
            "q_lora_rank": None, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
            "v_head_dim": 128, "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6,
            "moe_intermediate_size": 1408, "intermediate_size": 10944, "first_k_dense_replace": 1,
            "moe_layer_freq": 1, "n_group": 1, "topk_group": 1, "topk_method": "greedy",
            "scoring_func": "softmax", "norm_topk_prob": False, "routed_scaling_factor": 1.0,
            "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 163840,
            "rope_scaling": {
                "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096,
                "beta_fast": 32, "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707,
            },
        },
        tiny={"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 32,
              "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 16,
              "num_experts_per_tok": 4, "moe_intermediate_size": 32, "intermediate_size": 96},
        layer_tensors=_deepseek_layer,
    ),
    "gpt-oss-20b": Family(
        config={
            "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss",
            "hidden_size": 2880, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
            "num_local_experts": 32, "num_experts_per_tok": 4, "experts_per_token": 4,
            "intermediate_size": 2880, "attention_bias": True, "swiglu_limit": 7.0,
            "sliding_window": 128, "layer_types": [], "initial_context_length": 4096,
            "output_router_logits": False, "router_aux_loss_coef": 0.9, "rms_norm_eps": 1e-5,
            "rope_theta": 150000.0, "max_position_embeddings": 131072,
            "rope_scaling": {
                "rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096,
                "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
            },
        },
        tiny=TINY_GROUPED | {"head_dim": 16, "num_local_experts": 8, "intermediate_size": 64,
                             "sliding_window": 16},
        layer_tensors=_gpt_oss_layer,
    ),
}  # fmt: skip
