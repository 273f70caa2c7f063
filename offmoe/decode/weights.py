"""A model's weights as the CPU kernels read them, found by the names of a spec. Nothing is copied.

Shapes: D model width, E experts, K experts a token, H heads, W head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from offmoe.decode.spec import DecoderSpec, Heads, NoSpecError, Router, ShortConv, part_of
from offmoe.formats.dense import ExpertWeights
from offmoe.hf.replace import KernelLinear, make_linear
from offmoe.hf.seam import find_binding
from offmoe.kernels.activations import Activation, find_activation
from offmoe.kernels.cpu.decode import AttentionShape, CpuAttention, CpuLinear, CpuNorm
from offmoe.kernels.cpu.delta import CpuDelta, DeltaShape
from offmoe.kernels.cpu.kernels import CpuKernels
from offmoe.kernels.cpu.latent import CpuLatentAttention, LatentShape
from offmoe.kernels.cpu.layer import CpuRoute, RouteRule
from offmoe.kernels.cpu.mamba import MOST_TAPS as MOST_MAMBA_TAPS
from offmoe.kernels.cpu.mamba import CpuMamba, MambaShape
from offmoe.kernels.cpu.matrices import unreadable
from offmoe.kernels.cpu.mlp import CpuMlp
from offmoe.kernels.cpu.short_conv import MOST_TAPS, CpuShortConv
from offmoe.kernels.reference import ExpertMath

_EPS = ("variance_epsilon", "eps", "epsilon")
_WEIGHTS = ("weight", "scale")
_ACTIVATIONS = ("act_fn", "activation_fn", "act", "activation")


class WeightReader:
    """Reads the parts of one model, whose resident weights are of type `dtype`."""

    def __init__(self, kernels: CpuKernels, spec: DecoderSpec, dtype: torch.dtype) -> None:
        self._kernels, self._spec, self._dtype = kernels, spec, dtype

    def linear(self, module: Any, name: str) -> CpuLinear:
        """The linear of that name in a module. Raises NoSpecError."""
        return self._linear(part_of(module, name), name)

    def _linear(self, found: Any, name: str) -> CpuLinear:
        known = type(found) is nn.Linear or isinstance(found, KernelLinear)
        linear = make_linear(self._kernels, found) if known else None
        if linear is None or linear.dtype != self._dtype:
            raise NoSpecError(f"{name} is a {type(found).__name__} that the kernels do not read")
        return linear

    def head(self, model: Any) -> CpuLinear:
        """The matrix from the last state to logits. Raises NoSpecError."""
        return self._linear(model.get_output_embeddings(), "the head")

    def norm(self, module: Any, name: str, *, width: int = 0) -> CpuNorm:
        """The norm of that name in a module; of `width` numbers where it has no weight. Raises NoSpecError."""
        found = part_of(module, name)
        weight = next((value for name in _WEIGHTS if (value := getattr(found, name, None)) is not None), None)
        eps = next((value for name in _EPS if isinstance(value := getattr(found, name, None), float)), None)
        if weight is None and width and found is not None:
            weight = torch.ones(width, dtype=self._dtype)
        if weight is None or eps is None or weight.dtype != self._dtype or not weight.is_contiguous():
            raise NoSpecError(f"a norm is a {type(found).__name__} that the kernels do not read")
        kind = self._spec.norm_kind
        bias = getattr(found, "bias", None) if kind == "centred" else None
        return CpuNorm(
            self._kernels, weight.detach(), eps=eps, kind=kind, bias_D=None if bias is None else bias.detach()
        )

    def activation(self, module: nn.Module, width: int) -> Activation:
        """The curve of a gate that a module holds. Raises NoSpecError."""
        act = self._curve(module)
        found = find_activation(
            lambda rows: act(rows[..., :width]) * rows[..., width:], width, gated=True, device=torch.device("cpu")
        )
        if found is None:
            raise NoSpecError(f"{type(module).__name__}: its activation is none of those known")
        return found

    def _curve(self, module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
        named = (found for name in _ACTIVATIONS if callable(found := getattr(module, name, None)))
        act = next(named, self._spec.activation)
        if act is None:
            raise NoSpecError(f"{type(module).__name__} has no activation of a known name")
        return act

    def mlp(self, module: nn.Module, names: tuple[str, ...] | None = None) -> CpuMlp:
        """A dense block, or a shared expert; without a gate where its linears up are as wide as the one down. Raises
        NoSpecError.
        """
        *ups, down = (self.linear(module, name) for name in names or self._spec.mlp)
        act, hidden = self._curve(module), down.num_inputs
        limit = math.inf if self._spec.mlp_limit is None else float(getattr(module, self._spec.mlp_limit))
        biases = [up.bias_N for up in ups if up.bias_N is not None]
        mlp_math = ExpertMath(
            activate=(
                (lambda rows: act(rows[..., :hidden]).clamp(max=limit) * rows[..., hidden:].clamp(-limit, limit))
                if sum(up.num_outputs for up in ups) > hidden else act
            ),
            up_bias_EF=torch.cat(biases)[None] if biases else None,
            down_bias_ED=None if down.bias_N is None else down.bias_N[None],
            post_norm=None, transposed=False, dtype=down.dtype,
        )  # fmt: skip
        if biases and len(biases) < len(ups):
            raise NoSpecError(f"{type(module).__name__}: one of two linears has a bias")
        weights = ExpertWeights(up=tuple(up.matrix.weight for up in ups), down=(down.matrix.weight,))
        if (reason := self._kernels.supports(mlp_math, weights)) is not None:
            raise NoSpecError(f"{type(module).__name__}: {reason}")
        return CpuMlp(self._kernels, mlp_math, weights, max_rows=1)

    def heads(self, module: nn.Module, attention: Heads) -> CpuAttention:
        """Attention of grouped heads, between its projections. Raises NoSpecError."""
        inner = part_of(module, attention.name)
        names = [name for name in attention.projections[:3] if part_of(inner, name) is not None]
        linears = [self.linear(inner, name) for name in names]
        width = inner.head_dim
        query = linears[0].num_outputs // (2 if attention.gated else 1)
        shape = AttentionShape(
            num_heads=query // width, num_groups=linears[1].num_outputs // width, width=width,
            value_width=linears[-1].num_outputs * width // linears[1].num_outputs,
            scale=float(getattr(inner, attention.scale)), dtype=self._dtype,
            neighbours=attention.rotary in ("neighbours", "pairs"), norm_last=attention.norm_last, cap=attention.cap,
        )  # fmt: skip
        norms = [None, None] if attention.norms is None else [self.norm(inner, name) for name in attention.norms]
        sinks = None if attention.sinks is None else getattr(inner, attention.sinks)
        sinks = None if sinks is None else sinks.detach().contiguous()
        return CpuAttention(self._kernels, shape, query_norm=norms[0], key_norm=norms[1], sinks_H=sinks)

    def latents(self, inner: Any) -> CpuLatentAttention:
        """Attention to latents, between its projections. Raises NoSpecError."""
        weight, norm = inner.kv_b_proj.weight.detach(), self.norm(inner, "kv_a_layernorm")
        shape = LatentShape(
            num_heads=inner.num_heads, key_width=inner.qk_nope_head_dim, rotated=inner.qk_rope_head_dim,
            latent=inner.kv_lora_rank, value_width=inner.v_head_dim, scale=float(inner.scaling), dtype=self._dtype,
        )  # fmt: skip
        if inner.kv_b_proj.bias is not None or not shape.fits(weight, norm):
            raise NoSpecError("the matrix of keys and values is of another shape or format")
        return CpuLatentAttention(self._kernels, shape, norm, weight)

    def delta_net(self, inner: Any) -> CpuDelta:
        """A gated delta net between its projections. Raises NoSpecError."""
        shape = DeltaShape(
            num_keys=inner.num_k_heads, num_values=inner.num_v_heads, key_width=inner.head_k_dim,
            value_width=inner.head_v_dim, taps=inner.conv_kernel_size, dtype=self._dtype,
        )  # fmt: skip
        conv, norm = inner.conv1d.weight.detach(), inner.norm
        if inner.conv1d.bias is not None or conv.dtype != self._dtype or inner.activation not in ("silu", "swish"):
            raise NoSpecError("a delta net's convolution is of another kind")
        return CpuDelta(
            shape, conv.view(shape.channels, shape.taps), norm.weight.detach(), inner.A_log.detach(),
            inner.dt_bias.detach(), eps=norm.variance_epsilon,
        )  # fmt: skip

    def short_conv(self, inner: Any, attention: ShortConv) -> CpuShortConv:
        """A short convolution between its projections. Raises NoSpecError."""
        conv = part_of(inner, attention.conv)
        weight, bias = conv.weight.detach(), conv.bias
        if weight.dtype != self._dtype or weight.shape[1] != 1 or weight.shape[2] > MOST_TAPS:
            raise NoSpecError("a short convolution is of another kind")
        return CpuShortConv(weight.flatten(1).contiguous(), None if bias is None else bias.detach().contiguous())

    def mamba(self, inner: Any) -> CpuMamba:
        """A Mamba-2 mixer between its projections. Raises NoSpecError."""
        conv, norm = inner.conv1d.weight.detach(), inner.norm
        shape = MambaShape(
            num_heads=inner.num_heads, num_groups=inner.n_groups, width=inner.head_dim, size=inner.ssm_state_size,
            taps=inner.conv_kernel_size, dtype=self._dtype,
        )  # fmt: skip
        types = {part.dtype for part in (conv, norm.weight, inner.D)}
        if types != {self._dtype} or shape.taps > MOST_MAMBA_TAPS or inner.activation not in ("silu", "swish"):
            raise NoSpecError("a Mamba mixer is of another kind")
        # Granite's of older transformers (5.20) has one norm for all groups.
        if shape.num_groups > 1 and getattr(norm, "group_size", None) != norm.weight.numel() // shape.num_groups:
            raise NoSpecError("a Mamba mixer's norm is not one a group")
        bias = None if inner.conv1d.bias is None else inner.conv1d.bias.detach()
        return CpuMamba(
            shape, conv.flatten(1).contiguous(), bias, norm.weight.detach(), inner.A_log.detach(),
            inner.dt_bias.detach(), inner.D.detach(), eps=norm.variance_epsilon,
        )  # fmt: skip

    def factors(self, module: Any, name: str) -> torch.Tensor:
        """A parameter that rows are multiplied with. Raises NoSpecError."""
        found: torch.Tensor | None = part_of(module, name)
        if found is None or not torch.equal(found.detach().to(self._dtype).to(found.dtype), found.detach()):
            raise NoSpecError(f"{name} is not of the model's type")
        return found.detach().to(self._dtype).contiguous()

    def route(self, block: nn.Module, router: Router) -> tuple[CpuLinear, CpuRoute]:
        """The matrix and the rule of a MoE block's router. Raises NoSpecError."""
        weight, bias = part_of(block, router.weight), None if router.bias is None else part_of(block, router.bias)
        correction, expert_scale = (
            None if name is None else part_of(block, name) for name in (router.correction, router.expert_scale)
        )
        binding = find_binding(part_of(block, self._spec.moe.experts))
        top_k = router.top_k or _top_k(block, router)
        if weight is None or binding is None:
            raise NoSpecError(f"{type(block).__name__} has no {router.weight}")
        dtype = router.logits_dtype or weight.dtype
        weights_dtype = self._dtype if router.weights_dtype == "model" else router.weights_dtype or dtype
        if (reason := unreadable(weight, dtype)) is not None:
            raise NoSpecError(f"the router's weight: {reason}")
        linear = CpuLinear(
            self._kernels, weight.detach(), None if bias is None else bias.detach().contiguous(), dtype=dtype
        )
        rule = RouteRule(
            scoring=router.scoring, num_experts=binding.num_experts, top_k=top_k, normalised=router.normalised,
            weights_dtype=weights_dtype, is_sorted=router.is_sorted, scale=router.scale,
            groups=router.groups, hidden=router.hidden, added=router.added, is_rounded=router.is_rounded,
            jitter=router.jitter,
            correction_E=None if correction is None else correction.detach().float().flatten().contiguous(),
            expert_scale_E=None if expert_scale is None else expert_scale.detach().float().flatten().contiguous(),
        )  # fmt: skip
        if not rule.fits():
            raise NoSpecError(f"a router of {binding.num_experts} experts, {top_k} a token, groups {router.groups}")
        return linear, CpuRoute(self._kernels, rule, dtype)


def _top_k(block: nn.Module, router: Router) -> int:
    """The router's number of experts a token, or its block's."""
    name = router.weight
    while name := name.rpartition(".")[0]:
        if isinstance(found := part_of(block, f"{name}.top_k"), int):
            return found
    if isinstance(found := getattr(block, "top_k", None), int):
        return found
    raise NoSpecError(f"{type(block).__name__} does not say how many experts a token has")
