"""A MoE block's one token by the kernels: its router's rule in one call, then the experts, then what it adds to them.

What a block does is found by asking it at load, with an executor in the experts' place that notes what it is given and
answers with random rows. Taken is the rule that gives the ids that the block's own code gave, in its order, and its
weights up to the last bits (of bfloat16 and float16: one rounding), and the sum that the block makes of the experts'
answer, to the bit. A block where nothing fits keeps its own code.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from offmoe.kernels.cpu.decode import CpuLinear
from offmoe.kernels.cpu.kernels import CpuKernels
from offmoe.kernels.cpu.layer import SCORINGS, CpuRoute, RouteRule
from offmoe.kernels.cpu.matrices import unreadable
from offmoe.kernels.reference import ExpertMath
from offmoe.models.native import NativeModules
from offmoe.models.native_hooks import Hooks, without_hooks
from offmoe.models.seam import LayerBinding, find_binding

_KIND = "moe blocks"
# Rows that a block is asked about, some at a time: a few do not tell rules that differ in groups apart.
_NUM_CALLS, _NUM_ROWS = 16, 16
_WEIGHT_TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
_FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError)
Sum = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def swap_moe(native: NativeModules, model: nn.Module) -> None:
    """Swap every MoE block that is understood. Executors are attached, linears and MLPs are swapped."""
    for block in list(model.modules()):
        bindings = [(child, found) for child in block.children() if (found := find_binding(child)) is not None]
        if len(bindings) != 1 or "forward" in block.__dict__:
            continue
        with without_hooks(block.modules()):
            step = _make_step(native, block, *bindings[0])
        if step is not None:
            native.swap(block, step.forward, _KIND)


@dataclass(frozen=True, kw_only=True)
class _Call:
    """Rows, and what the block did with them. `answer_TD`: what it was told to be the experts' sums. `has_weights`: it
    gave the experts' weights beside its output, as gpt-oss's does.
    """

    x_TD: torch.Tensor
    ids_TK: torch.Tensor
    weights_TK: torch.Tensor
    answer_TD: torch.Tensor
    output_TD: torch.Tensor
    has_weights: bool = False


class _Tap:
    """In the executor's place: notes the call."""

    def __init__(self, answer_TD: torch.Tensor) -> None:
        self.answer_TD = answer_TD
        self.calls: list[tuple[torch.Tensor, ...]] = []

    def run_layer(
        self, layer_idx: int, math: ExpertMath, num_experts: int,
        x_TD: torch.Tensor, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """The answer, whatever is asked."""
        self.calls.append((x_TD.clone(), expert_ids_TK.clone(), weights_TK.clone()))
        return self.answer_TD.clone()


@torch.inference_mode()
def _make_step(native: NativeModules, block: nn.Module, experts: nn.Module, binding: LayerBinding) -> MoeStep | None:
    calls: list[_Call] = []
    for router in _routers(block, experts, binding.num_experts):
        calls = calls or list(_ask(block, binding, router.weight_ED.shape[1]))
        found = _find_route(native.kernels, router, calls) if calls else None
        total = None if found is None else _find_sum(block, experts, router.module, calls)
        if found is not None and total is not None and len({call.has_weights for call in calls}) == 1:
            return MoeStep(block, binding, router.module, *found, total, has_weights=calls[0].has_weights)
    return None


def _ask(block: nn.Module, binding: LayerBinding, width: int) -> Iterator[_Call]:
    """The block's own code on rows of different sizes, together and one alone; nothing where it is not called so."""
    dtype, executor = binding.dtype, binding.executor
    generator = torch.Generator().manual_seed(width)
    sizes = torch.tensor([0.3, 1.0, 2.0, 4.0]).repeat(_NUM_ROWS)[:, None]
    calls = []
    try:
        for num_rows in (1, *[_NUM_ROWS] * _NUM_CALLS):
            x = (torch.randn(num_rows, width, generator=generator) * sizes[:num_rows]).to(dtype)
            tap = binding.executor = _Tap(torch.randn(num_rows, width, generator=generator).to(dtype))
            output, *others = _as_tuple(type(block).forward(block, x[None]))
            if len(tap.calls) != 1 or not isinstance(output, torch.Tensor) or output.shape != (1, *x.shape):
                return
            given, ids, weights = tap.calls[0]
            if not torch.equal(given, x) or ids.dtype != torch.int64 or output.dtype != dtype:
                return
            if len(others) > 1 or not all(_same(other, weights) for other in others):
                return
            call = _Call(
                x_TD=x, ids_TK=ids, weights_TK=weights, answer_TD=tap.answer_TD, output_TD=output[0],
                has_weights=bool(others),
            )  # fmt: skip
            calls.append(call)
    except _FAILURES:
        return
    finally:
        binding.executor = executor
    yield from calls


def _as_tuple(output: Any) -> tuple[Any, ...]:
    return output if isinstance(output, tuple) and output else (output,)


def _same(given: object, known: torch.Tensor) -> bool:
    return isinstance(given, torch.Tensor) and given.dtype == known.dtype and torch.equal(given, known)


@dataclass(frozen=True, kw_only=True)
class _Router:
    """The matrix that makes a block's logits, numbers of each expert beside it, and settings of the block."""

    module: nn.Module
    weight_ED: torch.Tensor
    by_expert: list[torch.Tensor]
    settings: dict[str, Any]


def _routers(block: nn.Module, experts: nn.Module, num_experts: int) -> Iterator[_Router]:
    """Every matrix with a row for each expert. The experts' own are out of sight."""
    modules = [module for module in block.modules() if module not in set(experts.modules())]
    tensors = [(module, tensor) for module in modules for tensor in _tensors_of(module)]
    by_expert = [tensor for _, tensor in tensors if tensor.numel() == num_experts and tensor.is_floating_point()]
    for module, weight in tensors:
        if weight.dim() != 2 or weight.shape[0] != num_experts or weight.is_meta or not weight.is_contiguous():
            continue
        if unreadable(weight, weight.dtype) is None:
            settings = {**vars(block), **vars(module)}
            numbers = {name: value for name, value in settings.items() if isinstance(value, (int, float))}
            yield _Router(module=module, weight_ED=weight, by_expert=by_expert, settings=numbers)


def _tensors_of(module: nn.Module) -> list[torch.Tensor]:
    tensors = (*module._parameters.values(), *module._buffers.values())
    return [tensor.detach() for tensor in tensors if tensor is not None]


def _find_route(kernels: CpuKernels, router: _Router, calls: list[_Call]) -> tuple[CpuLinear, CpuRoute] | None:
    """The linear and the rule that give what the block's own code gave."""
    weight, dtype = router.weight_ED, calls[0].x_TD.dtype
    for logits_dtype in dict.fromkeys((dtype, torch.float32)):
        if unreadable(weight, logits_dtype) is not None:
            continue
        for bias in (None, *(bias for bias in router.by_expert if bias.dtype == logits_dtype)):
            linear = CpuLinear(kernels, weight, None if bias is None else bias.contiguous(), dtype=logits_dtype)
            logits = [linear(call.x_TD.to(logits_dtype)) for call in calls]
            corrections = [tensor.float().flatten().contiguous() for tensor in router.by_expert if tensor is not bias]
            for rule in _rules(router, calls[0], corrections):
                route = CpuRoute(kernels, rule, logits_dtype)
                if all(_gives(route, rows, call) for rows, call in zip(logits, calls, strict=True)):
                    return linear, route
    return None


def _rules(router: _Router, call: _Call, corrections: list[torch.Tensor]) -> Iterator[RouteRule]:
    """All that are known, with the numbers that the router and its block have."""
    scales = {1.0, *(float(value) for name, value in router.settings.items() if "scal" in name)}
    for scoring, correction, groups, normalised, is_sorted, scale in itertools.product(
        SCORINGS, (None, *corrections), _groups(router.settings), (False, True), (True, False), sorted(scales)
    ):
        for hidden in (-math.inf, 0.0) if groups else (-math.inf,):
            rule = RouteRule(
                scoring=scoring, num_experts=router.weight_ED.shape[0], top_k=call.ids_TK.shape[1],
                weights_dtype=call.weights_TK.dtype, normalised=normalised, is_sorted=is_sorted, scale=scale,
                groups=groups, hidden=hidden, correction_E=correction,
            )  # fmt: skip
            if rule.fits() and rule.weights_dtype in _WEIGHT_TOLERANCES:
                yield rule


def _groups(settings: dict[str, Any]) -> list[tuple[int, int, int] | None]:
    num_groups, kept = (
        next((settings[name] for name in names if isinstance(settings.get(name), int)), 1)
        for names in (("n_group", "num_group", "n_groups"), ("topk_group", "topk_groups"))
    )
    return [None] if num_groups <= 1 else [(num_groups, kept, best) for best in (1, 2)] + [None]


def _gives(route: CpuRoute, logits_TE: torch.Tensor, call: _Call) -> bool:
    tolerance = _WEIGHT_TOLERANCES[call.weights_TK.dtype]
    for logits_E, expected_ids, expected in zip(logits_TE, call.ids_TK, call.weights_TK, strict=True):
        ids_1K, weights_1K = route(logits_E)
        if not torch.equal(ids_1K[0], expected_ids):
            return False
        if not torch.allclose(weights_1K[0].float(), expected.float(), rtol=tolerance, atol=0.0):
            return False
    return True


def _find_sum(block: nn.Module, experts: nn.Module, router: nn.Module, calls: list[_Call]) -> Sum | None:
    """What the block makes of the experts' answer: itself, or with its shared experts', or with a share of it."""
    others = [child for child in block.children() if child is not experts and router not in child.modules()]
    others = [child for child in others if any(True for _ in child.parameters())]
    sums: list[Sum] = [] if others else [alone]
    if len(others) == 1:
        sums = [WithShared(others[0])]
    elif len(others) == 2:
        sums = [_with_gated(*pair) for pair in itertools.permutations(others)]
    for total in sums:
        try:
            if all(torch.equal(total(call.x_TD, call.answer_TD), call.output_TD) for call in calls):
                return total
        except _FAILURES:
            continue
    return None


def alone(x_TD: torch.Tensor, y_TD: torch.Tensor) -> torch.Tensor:
    """The experts' answer as it is."""
    return y_TD


@dataclass(frozen=True, slots=True)
class WithShared:
    """The sum with a shared expert's answer."""

    shared: nn.Module

    def __call__(self, x_TD: torch.Tensor, y_TD: torch.Tensor) -> torch.Tensor:
        """Both together."""
        return y_TD + self.shared(x_TD)  # type: ignore[no-any-return]


def _with_gated(shared: nn.Module, gate: nn.Module) -> Sum:
    return lambda x_TD, y_TD: y_TD + torch.sigmoid(gate(x_TD)) * shared(x_TD)


class MoeStep:
    """The `forward` of one MoE block. `router` and `route` give `route.ids_1K` and `route.weights_1K`."""

    def __init__(
        self, block: nn.Module, binding: LayerBinding, gate: nn.Module, router: CpuLinear, route: CpuRoute, total: Sum,
        *, has_weights: bool,
    ) -> None:  # fmt: skip
        """`gate` is the module that has the router's weight: the block itself, or a part of it. `has_weights`: the
        block gives the experts' weights, too.
        """
        self.block, self.gate, self.router, self.route = block, gate, router, route
        self._has_weights = has_weights
        self.binding, self.total = binding, total
        self.experts = next(child for child in block.children() if find_binding(child) is binding)
        self._original = type(block).forward
        self._told = [] if gate is block else [gate]
        self._hooks = Hooks((module for module in block.modules() if module is not block), self._told)

    @property
    def has_executor(self) -> bool:
        """Somebody computes the experts, and nobody stands in their module's place, as who asks for ids alone does."""
        return self.binding.executor is not None and "forward" not in vars(self.experts)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the block's own, for one token by the kernels."""
        x = hidden_states
        one = x.numel() == self.router.num_inputs and x.is_contiguous() and x.dtype == self.binding.dtype
        if args or kwargs or not one or torch.compiler.is_dynamo_compiling() or torch.is_grad_enabled():
            return self._original(self.block, x, *args, **kwargs)
        if not self._hooks.may_pass or not self.has_executor:
            return self._original(self.block, x)
        x_1D = x.view(1, -1)
        if self._told:
            self._hooks.tell(0, x_1D)
        self.route(self.router(x_1D.to(self.router.dtype)))
        return self.answer(self.finish(x_1D).view(x.shape))

    def answer(self, y: torch.Tensor) -> Any:
        """What the block's own code returns where its output is `y`."""
        return (y, self.route.weights_1K.clone()) if self._has_weights else y

    def finish(self, x_1D: torch.Tensor) -> torch.Tensor:
        """The block's output, (1, D), for the ids and weights that the route has given."""
        binding, route = self.binding, self.route
        assert binding.executor is not None and binding.math is not None, f"{binding=}"
        y_1D = binding.executor.run_layer(
            binding.layer_idx, binding.math, binding.num_experts, x_1D, route.ids_1K, route.weights_1K
        )
        return self.total(x_1D, y_1D)
