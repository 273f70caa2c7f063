"""Decoder layers of a family as data. `families.py` has an entry for each family, `layers.py` reads it.

Modules are named as in the layer: `"self_attn.q_norm"` is an attribute of an attribute. A name that a layer lacks is a
part that the layer lacks, so one entry serves dense and MoE layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from offmoe.kernels.cpu.decode import NormKind
from offmoe.kernels.cpu.latent import Rotation
from offmoe.kernels.cpu.layer import Scoring


class NoSpecError(Exception):
    """A model, or one of its layers, that the fused step cannot compute; the message says why."""


CosSinForm = Literal["own", "half", "every_second"]


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Attention of query heads that share key and value heads in groups.

    `norms`: of query and key, each over one head or over all. `rotary`: the angles' table has one number for each
    number that turns ("halves": the first half of them turns with the second), or one for each pair ("half_table").
    "neighbours": as "halves", but each number turns with the one beside it; "pairs": the same with each pair's angle
    twice, side by side, in float32. None: nothing turns. `norm_last`: norms
    come after turning. `value_norm`: of each head's value, without a weight;
    `value_scale`: the attribute with a factor of values. A layer without the third projection has
    the projected key as value. `gated`: the query's projection gives each head a second half, whose sigmoid multiplies
    the head's output. `gate`: a projection whose sigmoid (`gate_curve`) multiplies the output, a number for each of
    its numbers or one a head. `clip`: queries, keys and values are clamped to it, after the norms. `sinks`: a parameter
    with a logit a head. `scale`: the attribute with the factor of scores. `cap`: a soft one of scores.
    """

    name: str = "self_attn"
    projections: tuple[str, str, str, str] = ("q_proj", "k_proj", "v_proj", "o_proj")
    norms: tuple[str, str] | None = None
    norm_last: bool = False
    rotary: Literal["halves", "half_table", "neighbours", "pairs"] | None = "halves"
    value_norm: str | None = None
    value_scale: str | None = None
    gated: bool = False
    gate: str | None = None
    gate_curve: Literal["gate", "gate_softplus"] = "gate"
    clip: float | None = None
    sinks: str | None = None
    scale: str = "scaling"
    cap: float | None = None


@dataclass(frozen=True, kw_only=True)
class Latents:
    """Attention to cached latents (DeepSeek-V2, 2.1.2).

    `rotation`: see `Rotation` in abi.h. `query_scale`: a factor of the query of the token at a position.
    """

    name: str = "self_attn"
    rotation: Rotation = "halves"
    query_scale: Callable[[int], float] | None = None


@dataclass(frozen=True, kw_only=True)
class DeltaNet:
    """Gated delta net: running states in the place of keys and values.

    `projections`: of query, key and value; of the gate; of beta; of the decay. With two names, each key head's numbers
    lie together: (query, key, value, gate) in the first, (beta, decay) in the second.
    """

    name: str = "linear_attn"
    projections: tuple[str, ...] = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")


@dataclass(frozen=True, kw_only=True)
class ShortConv:
    """Gated short convolution (LFM2): the last inputs in the place of keys and values. `conv`: the convolution."""

    name: str = "conv"
    projections: tuple[str, str] = ("in_proj", "out_proj")
    conv: str = "conv"


@dataclass(frozen=True, kw_only=True)
class Mamba:
    """Mamba-2 mixer: running states in the place of keys and values."""

    name: str = "mamba"
    projections: tuple[str, str] = ("in_proj", "out_proj")


Attention = Heads | Latents | DeltaNet | ShortConv | Mamba


@dataclass(frozen=True, kw_only=True)
class Router:
    """Rule by which logits become experts and weights, as in `RouteRule`.

    `weight`: of the logits, (E, D), computed in `logits_dtype` (None: the weight's own). `correction`: a number an
    expert that is added to scores when experts are chosen. `groups`: (how many, how many are kept, how many best
    scores rank one); experts of the others score `hidden`. `added`: to the sum of weights. `weights_dtype`: None is
    the logits' type. `is_rounded`: each step in the logits' type. `jitter`: of the sparse mixer. `top_k`: None is the
    router's or its block's attribute. `logits_cap`: a soft one. `norm`, `input_scale`: what the router does to its
    input, an RMS norm without weight and a factor for each number, and then `input_factor`. `expert_scale`: a factor of
    each expert's weight.
    """

    weight: str = "gate.weight"
    bias: str | None = None
    scoring: Scoring = "softmax"
    normalised: bool = False
    is_sorted: bool = True
    scale: float = 1.0
    groups: tuple[int, int, int] | None = None
    hidden: float = -math.inf
    correction: str | None = None
    logits_dtype: torch.dtype | None = None
    weights_dtype: torch.dtype | Literal["model"] | None = None
    added: float | None = None
    is_rounded: bool = False
    jitter: float = 0.0
    top_k: int | None = None
    logits_cap: float | None = None
    norm: str | None = None
    input_scale: str | None = None
    input_factor: float = 1.0
    expert_scale: str | None = None


@dataclass(frozen=True, kw_only=True)
class Beside:
    """Norms of experts beside an MLP (Gemma 4): of what the MLP gives, of what experts are given, of what they give."""

    after_mlp: str
    before_experts: str
    after_experts: str


@dataclass(frozen=True, kw_only=True)
class Moe:
    """The block after attention; an empty `name` is the layer itself.

    `shared`: an MLP that every token passes, times the sigmoid of `shared_gate`; `shared_mlp` are its linears where
    they have other names than a dense block's. `scale` multiplies the experts' sum, `total_scale` the sum of both.
    `norm`: of what the block gives, inside it. `narrowed`: linears before and after the experts, where it has them.
    `beside`: the shared MLP reads the block's input, router and experts read the state before the block's norm.
    """

    name: str = "mlp"
    experts: str = "experts"
    router: Router = Router()
    shared: str | None = None
    shared_gate: str | None = None
    shared_mlp: tuple[str, ...] | None = None
    scale: float = 1.0
    total_scale: float = 1.0
    norm: str | None = None
    narrowed: tuple[str, str] | None = None
    beside: Beside | None = None


@dataclass(frozen=True, kw_only=True)
class DecoderSpec:
    """One layer: norm, attention, sum, norm, block, sum. Where `norms` has names for them, also norms of what
    attention and the block give, before the sums; an empty name is a norm that the family lacks.

    `attention`: one for all layers, or one for each. `embedding`, `residual`: factors of the embedding and of what is
    added. `logits_scale` and `logits_cap` (a soft one) belong to the head. `mlp`: a dense block's linears, gate and up
    may be one; `mlp_limit`: its attribute that bounds the activated gate, and up on both sides. `activation`: that of
    modules that have none as an attribute. `is_parallel`: the block reads what attention reads. `is_single`: a layer
    is one norm, and attention or (None) a block. `per_layer`: each layer adds to its output what the model makes of
    the id for that layer (Gemma's per-layer embeddings). `layer_scale`: a parameter that multiplies a layer's output.
    `rotary`, `last_norm`: modules of the decoder, the first one for all layers or one for each; None where nothing
    turns.
    """

    attention: Attention | Sequence[Attention | None]
    moe: Moe
    norm_kind: NormKind = "weight_last"
    norms: tuple[str, str, str, str] = ("input_layernorm", "", "post_attention_layernorm", "")
    mlp: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    mlp_limit: str | None = None
    activation: Callable[[torch.Tensor], torch.Tensor] | None = None
    is_parallel: bool = False
    is_single: bool = False
    per_layer: bool = False
    layer_scale: str | None = None
    rotary: str | Sequence[str] | None = "rotary_emb"
    last_norm: str = "norm"
    embedding: float = 1.0
    residual: float = 1.0
    logits_scale: float = 1.0
    logits_cap: float | None = None

    def attention_of(self, layer_idx: int) -> Attention | None:
        """That of one layer."""
        return self.attention[layer_idx] if isinstance(self.attention, Sequence) else self.attention

    def rotary_of(self, layer_idx: int) -> str | None:
        """Name of one layer's rotary module within the decoder."""
        return self.rotary if self.rotary is None or isinstance(self.rotary, str) else self.rotary[layer_idx]

    @property
    def cos_sin_form(self) -> CosSinForm:
        """Numbers of the model's table of angles that the kernels are given; all but "own" in float32."""
        if isinstance(self.attention, Latents):
            return "half"
        layers = self.attention if isinstance(self.attention, Sequence) else [self.attention]
        return "every_second" if any(isinstance(one, Heads) and one.rotary == "pairs" for one in layers) else "own"


def part_of(module: nn.Module, name: str) -> Any:
    """The module, parameter or number with that name, through attributes of attributes; None where there is none. An
    empty name is the module itself.
    """
    found: Any = module
    for attribute in name.split(".") if name else ():
        found = getattr(found, attribute, None)
    return found
