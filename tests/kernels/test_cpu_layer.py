"""A token's layer in one call against the same steps in calls of their own, and routers' rules against torch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cpu_cases import LEVELS, needs_library, open_kernels

from offmoe.checkpoint.quant_format import QuantFormat
from offmoe.formats.quantised import QuantMatrix
from offmoe.kernels.cpu.decode import AttentionShape, CpuAttention, CpuLinear, CpuNorm
from offmoe.kernels.cpu.kernels import CpuKernels
from offmoe.kernels.cpu.layer import CpuRoute, CpuTokenLayer, RouteRule

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTH, HEADS, GROUPS, HEAD, EXPERTS, TOP_K, ROWS = 96, 6, 2, 24, 40, 5, 9

pytestmark = needs_library


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / 4).to(dtype)


def int8(outputs: int, inputs: int) -> QuantMatrix:
    form = QuantFormat(kind="int8", group=inputs, offset=0, symmetric=True, scale_dtype="F32")
    codes = torch.randint(-9, 9, (outputs, inputs), dtype=torch.int8, generator=torch.Generator().manual_seed(outputs))
    return QuantMatrix(form, (outputs, inputs), codes, draw(outputs, 1).abs() / 9, None)


class Parts:
    """A layer's pieces; `quantised`: its linears are int8."""

    def __init__(self, kernels: CpuKernels, dtype: torch.dtype, logits_dtype: torch.dtype, *, quantised: bool) -> None:
        def linear(outputs: int, inputs: int, seed: int) -> CpuLinear:
            bias = draw(outputs, dtype=dtype, seed=seed + 50) if seed % 2 else None
            weight = int8(outputs, inputs) if quantised else draw(outputs, inputs, dtype=dtype, seed=seed)
            return CpuLinear(kernels, weight, bias, dtype=dtype)

        norms = [CpuNorm(kernels, draw(HEAD, dtype=dtype, seed=i) + 1, eps=1e-6, kind="weight_last") for i in (20, 21)]
        shape = AttentionShape(
            num_heads=HEADS, num_groups=GROUPS, width=HEAD, value_width=HEAD, scale=HEAD**-0.5, dtype=dtype
        )
        self.attention = CpuAttention(kernels, shape, query_norm=norms[0], key_norm=norms[1])
        self.norms = (
            CpuNorm(kernels, draw(WIDTH, dtype=dtype, seed=22) + 1, eps=1e-5, kind="weight_first"),
            CpuNorm(kernels, draw(WIDTH, dtype=dtype, seed=23), eps=1e-3, kind="one_plus_weight"),
        )
        sizes = [(HEADS * HEAD, WIDTH), (GROUPS * HEAD, WIDTH), (GROUPS * HEAD, WIDTH), (WIDTH, HEADS * HEAD)]
        self.projections = [linear(*size, seed=i) for i, size in enumerate(sizes)]
        self.router = CpuLinear(kernels, draw(EXPERTS, WIDTH, dtype=dtype, seed=30), None, dtype=logits_dtype)
        rule = RouteRule(scoring="softmax", num_experts=EXPERTS, top_k=TOP_K, weights_dtype=dtype, normalised=True)
        self.route = CpuRoute(kernels, rule, logits_dtype)
        self.whole = CpuTokenLayer(kernels, self.attention, self.norms, self.projections, (self.router, self.route))

    def one_by_one(self, x: torch.Tensor, *position: torch.Tensor) -> tuple[torch.Tensor, ...]:
        normed = self.norms[0](x)
        query, key, value = (linear(normed) for linear in self.projections[:3])
        heads = self.attention(query, key, value, *position)
        state = x + self.projections[3](heads.view(1, 1, -1))
        normed = self.norms[1](state)
        ids, weights = self.route(self.router(normed.to(self.router.dtype)))
        return state, normed[0], ids.clone(), weights.clone()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantised", [False, True])
def test_one_call_gives_the_bits_of_many(kernels: CpuKernels, dtype: torch.dtype, quantised: bool) -> None:
    for logits_dtype in {dtype, torch.float32}:
        parts = Parts(kernels, dtype, logits_dtype, quantised=quantised)
        x, cos, sin = draw(1, 1, WIDTH, dtype=dtype, seed=1), *(draw(1, 1, HEAD, dtype=dtype, seed=i) for i in (2, 3))
        caches = [draw(GROUPS, ROWS, HEAD, dtype=dtype, seed=i) for i in (4, 5)]
        others = [cache.clone() for cache in caches]
        expected = parts.one_by_one(x, cos, sin, *others)
        assert parts.whole.takes(x)
        state = parts.whole(x, cos, sin, *caches)
        found = (state, parts.whole.normed_1D, parts.route.ids_1K, parts.route.weights_1K)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(caches, others, strict=True))


@pytest.mark.parametrize("level", LEVELS)
def test_any_number_of_threads_gives_the_same_bits(level: str) -> None:
    results = []
    for threads in (1, 2):
        kernels = open_kernels(level, threads=threads)
        parts = Parts(kernels, torch.bfloat16, torch.bfloat16, quantised=False)
        x, cos, sin = (draw(1, 1, width, dtype=torch.bfloat16, seed=width) for width in (WIDTH, HEAD, HEAD))
        caches = [draw(GROUPS, ROWS, HEAD, dtype=torch.bfloat16, seed=i) for i in (4, 5)]
        results.append((parts.whole(x, cos, sin, *caches), parts.route.weights_1K, *caches))
        kernels.close()
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def mixed_by_torch(logits_1E: torch.Tensor, rule: RouteRule) -> tuple[torch.Tensor, torch.Tensor]:
    """The rule of Phi-MoE's router."""
    left, ids, weights = logits_1E.clone(), [], []
    for _ in range(rule.top_k):
        most, best = left.max(dim=-1, keepdim=True)
        far = (most - logits_1E) / logits_1E.abs().clamp(min=most) > rule.jitter
        ids.append(best)
        weights.append(left.masked_fill(far, -math.inf).softmax(-1).gather(1, best))
        left = left.scatter(1, best, -math.inf)
    return torch.cat(ids, dim=1), torch.cat(weights, dim=1).to(rule.weights_dtype)


def by_torch(logits_1E: torch.Tensor, rule: RouteRule) -> tuple[torch.Tensor, torch.Tensor]:
    """As transformers' routers write it."""
    if rule.scoring == "sparse_mixer":
        return mixed_by_torch(logits_1E, rule)
    of_chosen = rule.scoring.endswith("_of_chosen")
    scores = logits_1E if of_chosen and rule.correction_E is None else logits_1E.float()
    if rule.scoring == "softmax":
        scores = scores.softmax(-1)
    elif rule.scoring == "sigmoid":
        scores = logits_1E.sigmoid() if rule.is_rounded else scores.sigmoid()
    choice = scores if rule.correction_E is None else scores + rule.correction_E
    if rule.groups is not None:
        num_groups, kept, best = rule.groups
        ranks = choice.view(1, num_groups, -1).topk(best, dim=-1).values.sum(-1)
        mask = torch.zeros_like(ranks).scatter_(1, ranks.topk(kept, dim=-1, sorted=False).indices, 1).bool()
        choice = choice.masked_fill(~mask.repeat_interleave(rule.num_experts // num_groups, 1), rule.hidden)
    ids = choice.topk(rule.top_k, dim=-1, sorted=rule.is_sorted).indices
    weights = scores.gather(1, ids)
    if rule.scoring == "softmax_of_chosen":
        weights = weights.float().softmax(-1)
    if rule.scoring == "sigmoid_of_chosen":
        weights = weights.sigmoid() if rule.is_rounded else weights.float().sigmoid()
    if rule.normalised:
        added = rule.added if rule.added is not None else 1e-20 if rule.scoring == "sigmoid" else 0
        weights = weights / (weights.sum(-1, keepdim=True) + added)
    weights = weights * rule.scale
    return ids, (weights if rule.expert_scale_E is None else weights * rule.expert_scale_E[ids]).to(rule.weights_dtype)


RULES: dict[str, dict[str, Any]] = {
    "mixtral": {"scoring": "softmax", "normalised": True},
    "olmoe": {"scoring": "softmax"},
    "gpt_oss": {"scoring": "softmax_of_chosen"},
    "deepseek_v2": {"scoring": "softmax", "groups": (8, 3, 1), "hidden": 0.0, "scale": 16.0, "is_sorted": False},
    "deepseek_v3": {
        "scoring": "sigmoid", "normalised": True, "groups": (8, 4, 2), "hidden": 0.0, "scale": 2.5, "is_sorted": False,
        "correction_E": draw(64, seed=9),
    },
    "glm4": {"scoring": "sigmoid", "normalised": True, "correction_E": draw(64, seed=9), "is_sorted": False},
    "gemma4": {"scoring": "softmax", "normalised": True, "expert_scale_E": draw(64, seed=10)},
    "lfm2": {
        "scoring": "sigmoid", "normalised": True, "added": 1e-6, "scale": 1.5, "is_rounded": True,
        "correction_E": draw(64, seed=9),
    },
    "cohere2": {"scoring": "sigmoid_of_chosen", "normalised": True, "is_rounded": True},
    "phimoe": {"scoring": "sparse_mixer", "jitter": 0.5, "is_rounded": True},
    "kolibri1": {"scoring": "sigmoid_of_chosen", "normalised": True, "correction_E": draw(64, seed=9)},
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("top_k", [1, 6, 24])
def test_rules_choose_as_torch_does_also_among_equals(name: str, dtype: torch.dtype, top_k: int) -> None:
    kernels = open_kernels()
    rule = RouteRule(num_experts=64, top_k=top_k, weights_dtype=dtype, **RULES[name])
    assert rule.fits()
    route = CpuRoute(kernels, rule, dtype)
    num_equal = 0
    for seed in range(30):
        logits = draw(1, 64, seed=seed).mul(8).round().div(4).to(dtype)  # on a grid: many are alike
        num_equal += 64 - logits.unique().numel()
        ids, weights = route(logits)
        expected_ids, expected = by_torch(logits, rule)
        assert torch.equal(ids, expected_ids)
        torch.testing.assert_close(weights, expected)
    assert num_equal > 100


@pytest.mark.parametrize(
    "sizes",
    [
        {"top_k": 0}, {"top_k": 65}, {"groups": (7, 2, 1)}, {"groups": (8, 9, 1)}, {"groups": (8, 1, 9)},
        {"groups": (8, 1, 1), "top_k": 9}, {"correction_E": torch.zeros(63)}, {"expert_scale_E": torch.zeros(63)},
        {"correction_E": torch.zeros(64, dtype=torch.float16)},
    ],
)  # fmt: skip
def test_rules_whose_sizes_do_not_go_together(sizes: dict[str, Any]) -> None:
    numbers = {"num_experts": 64, "top_k": 6, "weights_dtype": torch.float32, "hidden": -math.inf, **sizes}
    assert not RouteRule(scoring="softmax", **numbers).fits()
