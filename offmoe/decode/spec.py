"""Decoder layers of a family as data. `families.py` has an entry for each family, `layers.py` reads it.

Modules are named as in the layer: `"self_attn.q_norm"` is an attribute of an attribute. A name that a layer lacks is a
part that the layer lacks, so one entry serves dense and MoE layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from offmoe.kernels.cpu.decode import NormKind
from offmoe.kernels.cpu.latent import Rotation
from offmoe.kernels.cpu.layer import Scoring


class NoSpecError(Exception):
    """A model, or one of its layers, that the fused step cannot compute; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Attention of query heads that share key and value heads in groups.

    `norms`: of query and key, each over one head or over all. `rotary`: the angles' table has one number for each
    number that turns ("halves": the first half of them turns with the second), or one for each pair ("half_table").
    "neighbours": as "halves", but each number turns with the one beside it. None: nothing turns. `norm_last`: norms
    come after turning. `gated`: the query's projection gives each head a second half, whose sigmoid multiplies the
    head's output. `clip`: queries, keys and values are clamped to it, after the norms. `sinks`: a parameter with a
    logit a head.
    """

    name: str = "self_attn"
    projections: tuple[str, str, str, str] = ("q_proj", "k_proj", "v_proj", "o_proj")
    norms: tuple[str, str] | None = None
    norm_last: bool = False
    rotary: Literal["halves", "half_table", "neighbours"] | None = "halves"
    gated: bool = False
    clip: float | None = None
    sinks: str | None = None


@dataclass(frozen=True, kw_only=True)
class Latents:
    """Attention to cached latents (DeepSeek-V2, 2.1.2). `rotation`: see `Rotation` in abi.h."""

    name: str = "self_attn"
    rotation: Rotation = "halves"


@dataclass(frozen=True, kw_only=True)
class DeltaNet:
    """Gated delta net: running states in the place of keys and values.

    `projections`: of query, key and value; of the gate; of beta; of the decay. With two names, each key head's numbers
    lie together: (query, key, value, gate) in the first, (beta, decay) in the second.
    """

    name: str = "linear_attn"
    projections: tuple[str, ...] = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")


Attention = Heads | Latents | DeltaNet


@dataclass(frozen=True, kw_only=True)
class Router:
    """Rule by which logits become experts and weights, as in `RouteRule`.

    `weight`: of the logits, (E, D), computed in `logits_dtype` (None: the weight's own). `correction`: a number an
    expert that is added to scores when experts are chosen. `groups`: (how many, how many are kept, how many best
    scores rank one); experts of the others score `hidden`. `weights_dtype`: None is the logits'
    type.
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


@dataclass(frozen=True, kw_only=True)
class Moe:
    """The block after attention. `shared`: an MLP that every token passes, times the sigmoid of `shared_gate`."""

    name: str = "mlp"
    experts: str = "experts"
    router: Router = Router()
    shared: str | None = None
    shared_gate: str | None = None


@dataclass(frozen=True, kw_only=True)
class DecoderSpec:
    """One layer: norm, attention, sum, norm, block, sum. Where `norms` has names for them, also norms of what
    attention and the block give, before the sums; an empty name is a norm that the family lacks.

    `attention`: one for all layers, or one for each. `embedding`, `residual`: factors of the embedding and of what is
    added. `logits_scale` and `logits_cap` (a soft one) belong to the head.
    """

    attention: Attention | Sequence[Attention]
    moe: Moe
    norm_kind: NormKind = "weight_last"
    norms: tuple[str, str, str, str] = ("input_layernorm", "", "post_attention_layernorm", "")
    mlp: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    embedding: float = 1.0
    residual: float = 1.0
    logits_scale: float = 1.0
    logits_cap: float | None = None

    def attention_of(self, layer_idx: int) -> Attention:
        """That of one layer."""
        return self.attention[layer_idx] if isinstance(self.attention, Sequence) else self.attention


def part_of(module: nn.Module, name: str) -> Any:
    """The module, parameter or number with that name, through attributes of attributes; None where there is none."""
    found: Any = module
    for attribute in name.split("."):
        found = getattr(found, attribute, None)
    return found
