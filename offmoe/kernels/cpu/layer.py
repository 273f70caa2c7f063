"""One token through a decoder layer up to its experts in one call of the library, and a router's rule.

Shapes: D model width, E experts, K experts a token, G groups of heads, S rows of a cache.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from offmoe.kernels.cpu import structs
from offmoe.kernels.cpu.decode import NORM_KINDS, CpuAttention, CpuLinear, CpuNorm, set_position
from offmoe.kernels.cpu.kernels import CpuKernels

Scoring = Literal["softmax", "sigmoid", "softmax_of_chosen", "sigmoid_of_chosen", "sparse_mixer"]
SCORINGS: dict[Scoring, int] = {
    "softmax": 0, "sigmoid": 1, "softmax_of_chosen": 2, "sigmoid_of_chosen": 3, "sparse_mixer": 4,
}  # fmt: skip
# Keeps the sum of scores that all are zero from dividing by zero, as DeepSeek's router has it.
_ADDED: dict[Scoring, float] = {"sigmoid": 1e-20}


@dataclass(frozen=True, kw_only=True)
class RouteRule:
    """Rule by which logits become experts and weights; see `Route` in abi.h.

    `groups`: (how many, how many of them are kept, how many best scores rank one); experts of the others score `hidden`
    when experts are chosen. `correction_E`, and `expert_scale_E` of weights: float32. `added`: to the sum, None as
    DeepSeek does it. `is_rounded`: each number is rounded to the logits' type.
    """

    scoring: Scoring
    num_experts: int
    top_k: int
    weights_dtype: torch.dtype
    normalised: bool = False
    is_sorted: bool = True
    scale: float = 1.0
    groups: tuple[int, int, int] | None = None
    hidden: float = -math.inf
    correction_E: torch.Tensor | None = None
    expert_scale_E: torch.Tensor | None = None
    added: float | None = None
    is_rounded: bool = False
    jitter: float = 0.0

    def fits(self) -> bool:
        """The sizes go together: nothing is read beside the scores."""
        num_groups, kept, best = self.groups or (1, 1, 1)
        vectors = [vector for vector in (self.correction_E, self.expert_scale_E) if vector is not None]
        return (
            0 < self.top_k <= self.num_experts
            and num_groups > 0
            and self.num_experts % num_groups == 0
            and 0 < kept <= num_groups
            and 0 < best <= self.num_experts // num_groups
            and (self.groups is None or kept * (self.num_experts // num_groups) >= self.top_k)
            and all((vector.dtype, vector.numel()) == (torch.float32, self.num_experts) for vector in vectors)
        )


class CpuRoute:
    """A rule, and where its answer goes: `ids_1K` (int64) and `weights_1K`, both overwritten by the next call."""

    def __init__(self, kernels: CpuKernels, rule: RouteRule, logits_dtype: torch.dtype) -> None:
        """`rule.fits()` is True."""
        self._kernels, self.rule, self.logits_dtype = kernels, rule, logits_dtype
        self.ids_1K = torch.zeros(1, rule.top_k, dtype=torch.int64)
        self.weights_1K = torch.zeros(1, rule.top_k, dtype=rule.weights_dtype)
        num_groups, kept, best = rule.groups or (1, 1, 1)
        self.struct = structs.CRoute(
            correction=None if rule.correction_E is None else rule.correction_E.data_ptr(),
            expert_scale=None if rule.expert_scale_E is None else rule.expert_scale_E.data_ptr(),
            ids=self.ids_1K.data_ptr(), weights=self.weights_1K.data_ptr(), scale=rule.scale,
            added=_ADDED.get(rule.scoring, 0.0) if rule.added is None else rule.added, hidden_score=rule.hidden,
            scoring=SCORINGS[rule.scoring], num_experts=rule.num_experts, top_k=rule.top_k, num_groups=num_groups,
            top_groups=kept, best_of_group=best, normalised=int(rule.normalised), sorted=int(rule.is_sorted),
            logits_type=structs.TYPES[logits_dtype], weights_type=structs.TYPES[rule.weights_dtype],
            rounded=int(rule.is_rounded), jitter=rule.jitter,
        )  # fmt: skip

    def __call__(self, logits_E: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and weights, (1, K) each, of one token's logits."""
        logits = logits_E.float().contiguous()
        assert logits.numel() == self.rule.num_experts, f"{logits_E.shape=}"
        scores = torch.empty(3 * logits.numel())
        self._kernels.run_route(ctypes.addressof(self.struct), logits.data_ptr(), scores.data_ptr())
        return self.ids_1K, self.weights_1K


class CpuTokenLayer:
    """norm, attention, the sum with x, norm, router: one token of one decoder layer. Serves one thread at a time.

    `normed_1D`, and the route's ids and weights, are what the experts are given; the next call overwrites them.
    """

    def __init__(
        self, kernels: CpuKernels, attention: CpuAttention, norms: tuple[CpuNorm, CpuNorm],
        projections: Sequence[CpuLinear], router: tuple[CpuLinear, CpuRoute] | None = None,
    ) -> None:  # fmt: skip
        """`norms`: before attention and after. `projections`: of query, key, value and output. All of one type."""
        shape, (first, second) = attention.shape, norms
        width = first.weight_D.numel()
        sizes = [shape.num_heads * shape.width, shape.num_groups * shape.width, shape.num_groups * shape.value_width]
        heads = torch.empty(sum(sizes) + shape.num_heads * shape.value_width, dtype=shape.dtype)
        expected = [*((size, width) for size in sizes), (width, shape.num_heads * shape.value_width)]
        assert [(linear.num_outputs, linear.num_inputs) for linear in projections] == expected, f"{expected=}"
        assert second.weight_D.numel() == width, f"{second.weight_D.shape=}"
        assert "centred" not in (first.kind, second.kind), f"{first.kind=} {second.kind=}"
        assert {linear.dtype for linear in projections} | {norm.weight_D.dtype for norm in norms} == {shape.dtype}
        self._kernels, self._width = kernels, width
        self._keep = (attention, norms, tuple(projections), router, heads)
        self.normed_1D = torch.empty(1, width, dtype=shape.dtype)
        call = self._call = structs.CLayer(
            attend=attention.struct, input_norm=first.weight_D.data_ptr(), output_norm=second.weight_D.data_ptr(),
            projections=tuple(ctypes.addressof(linear.matrix.struct) for linear in projections),
            biases=tuple(None if linear.bias_N is None else linear.bias_N.data_ptr() for linear in projections),
            normed=self.normed_1D.data_ptr(), width=width, input_eps=first.eps, output_eps=second.eps,
            input_kind=NORM_KINDS[first.kind], output_kind=NORM_KINDS[second.kind],
        )  # fmt: skip
        if router is not None:
            linear, route = router
            assert (linear.num_outputs, linear.num_inputs) == (route.rule.num_experts, width), f"{route.rule=}"
            assert linear.dtype == route.logits_dtype, f"{linear.dtype=} {route.logits_dtype=}"
            call.router, call.route = ctypes.addressof(linear.matrix.struct), route.struct
            call.router_bias = None if linear.bias_N is None else linear.bias_N.data_ptr()
        self._attend = attend = call.attend
        places = [heads[sum(sizes[:i]) :].data_ptr() for i in range(4)]
        attend.query, attend.key, attend.value, attend.output = places
        self._address = ctypes.addressof(call)

    @property
    def router(self) -> tuple[CpuLinear, CpuRoute] | None:
        """The router that ends it."""
        return self._keep[3]

    def call_between(self, x_1D: torch.Tensor, state_1D: torch.Tensor) -> structs.CLayer:
        """A call that always reads and writes these rows; its cache and angles are to be set. Keep this object."""
        assert self.takes(x_1D) and self.takes(state_1D), f"{x_1D.shape=} {state_1D.shape=}"
        call = structs.CLayer.from_buffer_copy(self._call)
        call.x, call.state = x_1D.data_ptr(), state_1D.data_ptr()
        return call

    def takes(self, x: torch.Tensor) -> bool:
        """One row, contiguous, of the layer's type and width."""
        return x.numel() == self._width and x.dtype == self.normed_1D.dtype and x.is_contiguous()

    def __call__(
        self, x: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None, keys_GSW: torch.Tensor,
        values_GSW: torch.Tensor, *, half_angles: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        """x plus attention's output, of x's shape. `takes` said True; the rest is as of CpuAttention. Raises
        MemoryError.
        """
        state, call = torch.empty_like(x), self._call
        call.x, call.state = x.data_ptr(), state.data_ptr()
        set_position(self._attend, cos, sin, keys_GSW, values_GSW, half_angles=half_angles)
        self._kernels.run_layer(self._address)
        return state
