"""The families of the fused step whose layers have parts that few others have: what each one's layers are.

Short convolutions, experts beside an MLP, capped scores, gates of a projection of their own. Checked against
transformers 5.23, as `families.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from offmoe.decode.families.rules import FLOAT, grouped_sigmoid
from offmoe.decode.spec import (
    Attention,
    Beside,
    DecoderSpec,
    Heads,
    Latents,
    Mamba,
    Moe,
    NoSpecError,
    Router,
    ShortConv,
)


def gemma4(config: Any) -> DecoderSpec:
    """Gemma 4: experts beside an MLP, each between norms; a router with a norm of its own."""
    if config.num_kv_shared_layers:
        raise NoSpecError("layers share keys and values")
    router = Router(
        weight="router.proj.weight", normalised=True, weights_dtype=FLOAT, top_k=config.top_k_experts,
        norm="router.norm", input_scale="router.scale", input_factor=config.hidden_size**-0.5,
        expert_scale="router.per_expert_scale",
    )  # fmt: skip
    beside = Beside(
        after_mlp="post_feedforward_layernorm_1", before_experts="pre_feedforward_layernorm_2",
        after_experts="post_feedforward_layernorm_2",
    )  # fmt: skip
    return DecoderSpec(
        attention=Heads(norms=("q_norm", "k_norm"), value_norm="v_norm"),
        moe=Moe(name="", router=router, shared="mlp", beside=beside), norm_kind="weight_first",
        norms=(
            "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
        ),
        per_layer=bool(config.hidden_size_per_layer_input), layer_scale="layer_scalar",
        logits_cap=config.final_logit_softcapping,
    )  # fmt: skip


def lfm2_moe(config: Any) -> DecoderSpec:
    """LFM2-MoE: short convolutions, one attention layer for some of them."""
    heads = Heads(
        projections=("q_proj", "k_proj", "v_proj", "out_proj"), norms=("q_layernorm", "k_layernorm")
    )  # fmt: skip
    router = Router(
        scoring="sigmoid", normalised=config.norm_topk_prob, added=1e-6, scale=config.routed_scaling_factor,
        correction="expert_bias" if config.use_expert_bias else None, is_rounded=True,
    )  # fmt: skip
    return DecoderSpec(
        attention=[ShortConv() if kind == "conv" else heads for kind in config.layer_types],
        moe=Moe(name="feed_forward", router=router), norms=("operator_norm", "", "ffn_norm", ""),
        mlp=("w1", "w3", "w2"), activation=torch.nn.functional.silu, rotary="pos_emb", last_norm="embedding_norm",
    )  # fmt: skip


def grok1(config: Any) -> DecoderSpec:
    """Grok-1, in offmoe's own class: four norms a layer, scores with a soft cap, constant factors."""
    return DecoderSpec(
        attention=Heads(name="attn", scale="multiplier", cap=config.max_attn_value),
        moe=Moe(name="moe_block", router=Router(weights_dtype="model")), norm_kind="weight_first",
        norms=("pre_attn_norm", "post_attn_norm", "pre_moe_norm", "post_moe_norm"),
        embedding=config.embedding_multiplier_scale, logits_scale=config.output_multiplier_scale,
    )  # fmt: skip


def afmoe(config: Any) -> DecoderSpec:
    """AFMoE: four norms a layer, gated attention; only layers with a window turn."""
    heads = {
        kind: Heads(norms=("q_norm", "k_norm"), gate="gate_proj", rotary="halves" if turns else None)
        for kind, turns in (("sliding_attention", True), ("full_attention", False))
    }
    router = Router(
        weight="router.gate.weight", scoring="sigmoid", normalised=True, scale=config.route_scale,
        correction="expert_bias", weights_dtype=FLOAT,
    )  # fmt: skip
    return DecoderSpec(
        attention=[heads[kind] for kind in config.layer_types], moe=Moe(router=router, shared="shared_experts"),
        norm_kind="weight_first",
        norms=("input_layernorm", "post_attention_layernorm", "pre_mlp_layernorm", "post_mlp_layernorm"),
        embedding=config.hidden_size**0.5 if config.mup_enabled else 1.0,
    )  # fmt: skip


def cohere2_moe(config: Any) -> DecoderSpec:
    """Command's MoE: attention and block read the same normed row; neighbours turn with each other, in some layers."""
    averaged = config.num_shared_experts > 0 and config.shared_expert_combination_strategy == "average"
    router = (
        Router(scoring="softmax_of_chosen", weights_dtype="model")
        if config.expert_selection_fn == "softmax"
        else Router(scoring="sigmoid_of_chosen", normalised=config.norm_topk_prob, is_rounded=True)
    )
    always = config.prefix_dense_sliding_window_pattern == 1
    turns = [
        kind == "sliding_attention" or (block == "dense" and always)
        for kind, block in zip(config.layer_types, config.mlp_layer_types, strict=True)
    ]
    return DecoderSpec(
        attention=[Heads(rotary="pairs" if turn else None) for turn in turns],
        moe=Moe(router=router, shared="shared_experts", total_scale=0.5 if averaged else 1.0),
        norm_kind="weight_last" if config.rms_norm_eps is not None else "centred",
        norms=("input_layernorm", "", "", ""), is_parallel=True, logits_scale=config.logit_scale,
    )  # fmt: skip


def granitemoeshared(config: Any) -> DecoderSpec:
    """Granite MoE with a shared MLP beside the experts; with sinks and angles of its own for each layer, too."""
    thetas: list[float] = getattr(config, "layer_rope_theta", None) or []
    heads = Heads(sinks="sinks" if thetas else None)
    known = sorted({theta for theta in thetas if theta})
    router = Router(weight="block_sparse_moe.router.weight", scoring="softmax_of_chosen", weights_dtype="model")
    moe = Moe(
        name="", experts="block_sparse_moe.experts", router=router, shared="shared_mlp",
        shared_mlp=("input_linear", "output_linear"),
    )  # fmt: skip
    return DecoderSpec(
        attention=[heads if theta else replace(heads, rotary=None) for theta in thetas] if thetas else heads,
        moe=moe, embedding=config.embedding_multiplier, residual=config.residual_multiplier,
        logits_scale=1 / config.logits_scaling,
        rotary="rotary_emb" if not known else [f"rotary_embs.{known.index(t) if t else 0}" for t in thetas],
    )  # fmt: skip


def granitemoehybrid(config: Any) -> DecoderSpec:
    """Granite 4.0 H: Mamba-2 mixers, one attention layer for some of them; without angles as a rule."""
    if not config.num_local_experts:
        raise NoSpecError("a model without experts")
    turns = config.position_embedding_type == "rope"
    heads = Heads(rotary="halves" if turns else None)
    layers = [Mamba() if kind == "linear_attention" else heads for kind in config.layers_block_type]
    return replace(granitemoeshared(config), attention=layers, rotary="rotary_emb" if turns else None)


def nemotron_h(config: Any) -> DecoderSpec:
    """Nemotron-H: a layer is a Mamba-2 mixer, attention without angles, experts or an MLP, these without gates."""
    kinds: dict[str, Attention | None] = {
        "linear_attention": Mamba(name="mixer"), "full_attention": Heads(name="mixer", rotary=None),
    }  # fmt: skip
    moe = Moe(
        name="mixer", router=grouped_sigmoid(config), shared="shared_experts",
        narrowed=("fc1_latent_proj", "fc2_latent_proj"),
    )  # fmt: skip
    return DecoderSpec(
        attention=[kinds.get(kind) for kind in config.layers_block_type], moe=moe, norm_kind="weight_first",
        norms=("norm", "", "", ""), mlp=("up_proj", "down_proj"), is_single=True, rotary=None, last_norm="norm_f",
    )  # fmt: skip


def axk1(config: Any) -> DecoderSpec:
    """A.X-K1: DeepSeek-V3 with a norm of what the experts' block gives."""
    return DecoderSpec(
        attention=Latents(rotation="apart" if config.rope_interleave else "halves"),
        moe=Moe(router=grouped_sigmoid(config), shared="shared_experts", norm="post_mlp_layernorm"),
    )


def mimo_v2_flash(config: Any) -> DecoderSpec:
    """MiMo-V2-Flash: values of another width, with a factor; layers with a window have sinks."""
    return DecoderSpec(
        attention=Heads(sinks="sinks", value_scale="v_scale"), moe=Moe(router=grouped_sigmoid(config))
    )  # fmt: skip


def _windowed(config: Any, **more: Any) -> list[Heads]:
    """Heads of which only those with a window turn."""
    turns = [config.sliding_window is None or kind == "sliding_attention" for kind in config.layer_types]
    return [Heads(norms=("q_norm", "k_norm"), rotary="halves" if turn else None, **more) for turn in turns]


def flint(config: Any) -> DecoderSpec:
    """Flint: sinks everywhere, a shared expert without a gate."""
    router = Router(scoring="sigmoid", normalised=config.norm_topk_prob, added=0.0, logits_dtype=FLOAT)
    return DecoderSpec(
        attention=_windowed(config, sinks="sinks"), moe=Moe(router=router, shared="shared_expert"),
        norm_kind="weight_first",
    )  # fmt: skip


def kolibri1(config: Any) -> DecoderSpec:
    """Kolibri-1: experts are chosen by corrected logits, four norms a layer."""
    router = Router(
        scoring="sigmoid_of_chosen", normalised=config.norm_topk_prob, correction="gate.e_score_correction_bias",
        logits_dtype=FLOAT,
    )  # fmt: skip
    return DecoderSpec(
        attention=_windowed(config), moe=Moe(router=router, shared="shared_experts"),
        norms=("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),
    )  # fmt: skip


def laguna(config: Any) -> DecoderSpec:
    """Laguna: softplus gates, a number a head or a number each; layers differ in their heads; capped router logits."""
    router = Router(
        scoring="sigmoid", normalised=True, added=0.0, correction="gate.e_score_correction_bias",
        logits_dtype=FLOAT, weights_dtype="model", logits_cap=config.moe_router_logit_softcapping or None,
    )  # fmt: skip
    return DecoderSpec(
        attention=Heads(norms=("q_norm", "k_norm"), gate="g_proj", gate_curve="gate_softplus"),
        moe=Moe(router=router, shared="shared_experts", scale=config.moe_routed_scaling_factor),
    )  # fmt: skip


def phimoe(config: Any) -> DecoderSpec:
    """Phi-3.5-MoE: layer norms, biases, the sparse mixer's router."""
    router = Router(
        weight="router.weight", scoring="sparse_mixer", jitter=2 * config.router_jitter_noise, is_rounded=True,
    )  # fmt: skip
    return DecoderSpec(attention=Heads(), moe=Moe(router=router), norm_kind="centred")


def step3p7(config: Any) -> DecoderSpec:
    """The text model of Step 3.5 and 3.7: a gate a head, clamped MLPs in some layers."""
    router = Router(
        scoring="sigmoid", normalised=True, added=0.0, is_sorted=False, correction="gate.e_score_correction_bias",
        weights_dtype=FLOAT,
    )  # fmt: skip
    return DecoderSpec(
        attention=Heads(norms=("q_norm", "k_norm"), gate="g_proj"),
        moe=Moe(router=router, shared="shared_experts", scale=config.moe_router_scaling_factor),
        norm_kind="one_plus_weight", mlp_limit="limit",
    )  # fmt: skip


def mistral4(config: Any) -> DecoderSpec:
    """Mistral 4: DeepSeek-V3's attention, with queries that grow with the position (Llama 4), and softmax scores."""
    rope = config.rope_parameters
    beta, length = rope.get("llama_4_scaling_beta"), rope.get("original_max_position_embeddings")
    if not beta or not length:
        raise NoSpecError("the growth of queries is not in the config")
    router = Router(
        normalised=config.norm_topk_prob, added=1e-20, scale=config.routed_scaling_factor, is_sorted=False,
        groups=(config.n_group, config.topk_group, 2) if (config.n_group or 1) > 1 else None, hidden=0.0,
        is_rounded=True,
    )  # fmt: skip
    return DecoderSpec(
        attention=Latents(
            rotation="apart" if config.rope_interleave else "halves",
            query_scale=lambda position: 1 + beta * math.log1p(position // length),
        ),
        moe=Moe(router=router, shared="shared_experts"),
    )  # fmt: skip


WIDE: dict[str, Callable[[Any], DecoderSpec]] = {
    "gemma4_text": gemma4,
    "lfm2_moe": lfm2_moe,
    "grok-1": grok1,
    "afmoe": afmoe,
    "axk1": axk1,
    "mimo_v2_flash": mimo_v2_flash,
    "flint": flint,
    "kolibri1": kolibri1,
    "laguna": laguna,
    "mistral4": mistral4,
    "phimoe": phimoe,
    "step3p5": step3p7,
    "cohere2_moe": cohere2_moe,
    "granitemoeshared": granitemoeshared,
    "granitemoe_swa": granitemoeshared,
    "granitemoehybrid": granitemoehybrid,
    "nemotron_h": nemotron_h,
}
