"""The families that the fused step computes: what each one's layers are, read from its config.

Checked against transformers 5.20 to 5.24: the first tokens of every engine are computed both ways, and
tests/decode/test_decode_families.py holds the path of every family. Sources are the families' modeling files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from offmoe.decode.families.left_out import LEFT_OUT
from offmoe.decode.families.rules import FLOAT, grouped_sigmoid, softmax
from offmoe.decode.families.wide import WIDE
from offmoe.decode.spec import DecoderSpec, DeltaNet, Heads, Latents, Moe, NoSpecError, Router


def _qk_normed(config: Any, **more: Any) -> Heads:
    return Heads(norms=("q_norm", "k_norm"), **more)


def mixtral(config: Any) -> DecoderSpec:
    """Mixtral's weights stay in float32."""
    return DecoderSpec(attention=Heads(), moe=Moe(router=Router(normalised=True, weights_dtype=FLOAT)))


def olmoe(config: Any) -> DecoderSpec:
    """OLMoE norms queries and keys over all heads, and may clip them."""
    return DecoderSpec(attention=_qk_normed(config, clip=config.clip_qkv), moe=Moe(router=softmax(config)))


def qwen2_moe(config: Any) -> DecoderSpec:
    """Qwen2-MoE: a shared expert behind a gate."""
    moe = Moe(router=softmax(config), shared="shared_expert", shared_gate="shared_expert_gate")
    return DecoderSpec(attention=Heads(), moe=moe)


def qwen3_moe(config: Any) -> DecoderSpec:
    """Qwen3-MoE."""
    return DecoderSpec(attention=_qk_normed(config), moe=Moe(router=softmax(config)))


def qwen3_vl_moe(config: Any) -> DecoderSpec:
    """The text model of Qwen3-VL-MoE."""
    return DecoderSpec(attention=_qk_normed(config), moe=Moe(router=softmax(config, normalised=True)))


def gpt_oss(config: Any) -> DecoderSpec:
    """gpt-oss: sinks, biases, a table of angles of half the width."""
    router = Router(weight="router.weight", bias="router.bias", scoring="softmax_of_chosen")
    return DecoderSpec(attention=Heads(rotary="half_table", sinks="sinks"), moe=Moe(router=router))


def glm4_moe(config: Any) -> DecoderSpec:
    """GLM-4.5 and 4.6: a part of each head turns; shared experts."""
    attention = _qk_normed(config) if config.use_qk_norm else Heads()
    return DecoderSpec(attention=attention, moe=Moe(router=grouped_sigmoid(config), shared="shared_experts"))


def glm4v_moe(config: Any) -> DecoderSpec:
    """The text model of GLM-4.5V."""
    return DecoderSpec(attention=Heads(), moe=Moe(router=grouped_sigmoid(config), shared="shared_experts"))


def dots1(config: Any) -> DecoderSpec:
    """dots.llm1."""
    return DecoderSpec(attention=_qk_normed(config), moe=Moe(router=grouped_sigmoid(config), shared="shared_experts"))


def exaone_moe(config: Any) -> DecoderSpec:
    """EXAONE-MoE: layers without a window do not turn where others have one."""
    turns = [config.sliding_window is None or kind == "sliding_attention" for kind in config.layer_types]
    return DecoderSpec(
        attention=[_qk_normed(config, rotary="halves" if turn else None) for turn in turns],
        moe=Moe(router=grouped_sigmoid(config), shared="shared_experts"),
    )


def deepseek_v3(config: Any) -> DecoderSpec:
    """DeepSeek-V3, Kimi-K2."""
    return DecoderSpec(
        attention=Latents(rotation="apart" if config.rope_interleave else "halves"),
        moe=Moe(router=grouped_sigmoid(config), shared="shared_experts"),
    )


def deepseek_v2(config: Any) -> DecoderSpec:
    """DeepSeek-V2: softmax scores, pairs that turn as complex numbers."""
    limited = config.topk_method == "group_limited_greedy"
    router = Router(
        is_sorted=False, scale=config.routed_scaling_factor, hidden=0.0, logits_dtype=FLOAT,
        groups=(config.n_group, config.topk_group, 1) if limited else None,
    )  # fmt: skip
    return DecoderSpec(attention=Latents(rotation="pairs"), moe=Moe(router=router, shared="shared_experts"))


def deepseek_ocr(config: Any) -> DecoderSpec:
    """DeepSeek-OCR's text model: DeepSeek-V2's experts, attention without latents."""
    return replace(deepseek_v2(config), attention=Heads())


def minimax_m2(config: Any) -> DecoderSpec:
    """MiniMax-M2: norms over all heads, a correction that the block holds."""
    router = Router(
        scoring="sigmoid", normalised=True, is_sorted=False, correction="e_score_correction_bias", weights_dtype=FLOAT
    )
    return DecoderSpec(attention=_qk_normed(config), moe=Moe(router=router))


def granitemoe(config: Any) -> DecoderSpec:
    """Granite MoE: multipliers everywhere."""
    router = Router(weight="router.weight", scoring="softmax_of_chosen")
    return DecoderSpec(
        attention=Heads(), moe=Moe(name="block_sparse_moe", router=router), embedding=config.embedding_multiplier,
        residual=config.residual_multiplier, logits_scale=1 / config.logits_scaling,
    )  # fmt: skip


def flex_olmo(config: Any) -> DecoderSpec:
    """FlexOlmo: norms after attention and after the block, none before."""
    return DecoderSpec(
        attention=_qk_normed(config), moe=Moe(router=softmax(config)),
        norms=("", "post_attention_layernorm", "", "post_feedforward_layernorm"),
    )  # fmt: skip


def aria(config: Any) -> DecoderSpec:
    """Aria's text model."""
    router = Router(weight="router.weight", scoring="softmax_of_chosen")
    return DecoderSpec(attention=Heads(), moe=Moe(router=router, shared="shared_experts"))


def hy_v3(config: Any) -> DecoderSpec:
    """Hunyuan V3: the block holds the correction."""
    router = Router(
        scoring="sigmoid", normalised=True, is_sorted=False, scale=config.router_scaling_factor,
        correction="e_score_correction_bias", logits_dtype=FLOAT,
    )  # fmt: skip
    return DecoderSpec(attention=_qk_normed(config), moe=Moe(router=router, shared="shared_experts"))


def solar_open(config: Any) -> DecoderSpec:
    """Solar Open."""
    return DecoderSpec(attention=Heads(), moe=Moe(router=grouped_sigmoid(config), shared="shared_experts"))


def ernie4_5_moe(config: Any) -> DecoderSpec:
    """ERNIE 4.5: neighbours turn with each other, in float32."""
    router = Router(
        normalised=True, correction="gate.moe_statics.e_score_correction_bias", logits_dtype=FLOAT,
        weights_dtype="model",
    )  # fmt: skip
    return DecoderSpec(attention=Heads(rotary="neighbours"), moe=Moe(router=router, shared="shared_experts"))


def hunyuan_v1_moe(config: Any) -> DecoderSpec:
    """Hunyuan-A13B: norms after turning, a shared expert beside the routed ones."""
    return DecoderSpec(
        attention=Heads(norms=("query_layernorm", "key_layernorm"), norm_last=True),
        moe=Moe(router=Router(weight="gate.wg.weight", normalised=True), shared="shared_mlp"),
    )  # fmt: skip


def _gated(config: Any, net: DeltaNet, router: Router) -> DecoderSpec:
    """Three layers of four have running states, the others gated attention."""
    heads = _qk_normed(config, gated=True)
    return DecoderSpec(
        attention=[net if kind == "linear_attention" else heads for kind in config.layer_types],
        moe=Moe(router=router, shared="shared_expert", shared_gate="shared_expert_gate"),
        norm_kind="one_plus_weight",
    )  # fmt: skip


def qwen3_next(config: Any) -> DecoderSpec:
    """Qwen3-Next."""
    return _gated(config, DeltaNet(projections=("in_proj_qkvz", "in_proj_ba")), softmax(config))


def qwen3_5_moe(config: Any) -> DecoderSpec:
    """Qwen3.5-MoE: its router always makes the weights' sum 1."""
    return _gated(config, DeltaNet(), softmax(config, normalised=True))


FAMILIES: dict[str, Callable[[Any], DecoderSpec]] = {
    "aria_text": aria,
    "deepseek_ocr2_text": deepseek_ocr,
    "deepseek_v2": deepseek_v2,
    "deepseek_v3": deepseek_v3,
    "dots1": dots1,
    "ernie4_5_moe": ernie4_5_moe,
    "exaone_moe": exaone_moe,
    "flex_olmo": flex_olmo,
    "glm4_moe": glm4_moe,
    "glm4_moe_lite": deepseek_v3,
    "glm4v_moe_text": glm4v_moe,
    "gpt_oss": gpt_oss,
    "granitemoe": granitemoe,
    "hunyuan_v1_moe": hunyuan_v1_moe,
    "hy_v3": hy_v3,
    "mellum": qwen3_moe,
    "minimax_m2": minimax_m2,
    "mixtral": mixtral,
    "olmoe": olmoe,
    "qwen2_moe": qwen2_moe,
    "qwen3_5_moe_text": qwen3_5_moe,
    "qwen3_moe": qwen3_moe,
    "qwen3_next": qwen3_next,
    "qwen3_omni_moe_text": qwen3_moe,
    "qwen3_vl_moe_text": qwen3_vl_moe,
    "solar_open": solar_open,
    **WIDE,
}


def spec_of(config: Any) -> DecoderSpec:
    """The spec of a text model's config. Raises NoSpecError."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        reason = LEFT_OUT.get(config.model_type)
        raise NoSpecError(f"no spec for {config.model_type}" + (f": {reason}" if reason else ""))
    try:
        return family(config)
    except AttributeError as error:  # transformers has renamed it
        raise NoSpecError(f"the spec of {config.model_type} does not fit: {error}") from None
