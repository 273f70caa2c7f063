"""Resident MLPs, of dense layers and shared experts, in one call of the kernels in place of three linears and torch.

Taken are modules with three linears and an activation that give, on random rows, what down(act(gate(x)) * up(x)) gives,
computed as experts are.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import nn

from offmoe.formats.dense import ExpertWeights
from offmoe.kernels.cpu.decode import CpuLinear
from offmoe.kernels.cpu.kernels import CpuKernels
from offmoe.kernels.cpu.mlp import CpuMlp
from offmoe.kernels.reference import ExpertMath
from offmoe.models.native import MAX_ROWS, NativeModules, agree, make_linear
from offmoe.models.native_hooks import Hooks, without_hooks

_KIND = "mlps"
_ACTIVATIONS = ("act_fn", "activation_fn", "act")
Curve = Callable[[torch.Tensor], torch.Tensor]


@torch.inference_mode()
def swap_mlps(native: NativeModules, model: nn.Module) -> None:
    """Swap every MLP that is understood, and whose linears are swapped."""
    for module in list(model.modules()):
        linears = [child for child in module.children() if type(child) is nn.Linear and "forward" in child.__dict__]
        names = {name.rpartition(".")[0] for name, _ in module.named_parameters()}
        if len(linears) != 3 or len(names - {name for name, _ in module.named_children()}) or "forward" in vars(module):
            continue
        act = next((found for name in _ACTIVATIONS if callable(found := getattr(module, name, None))), None)
        if act is None:
            continue
        with without_hooks(module.modules()):
            mlp = _find(native.kernels, module, linears, act)
        if mlp is not None:
            native.swap(module, MlpStep(module, mlp).forward, _KIND)


def _find(kernels: CpuKernels, module: nn.Module, modules: Sequence[nn.Linear], act: Curve) -> CpuMlp | None:
    linears = [make_linear(kernels, linear) for linear in modules]
    if any(linear is None for linear in linears):
        return None
    for gate, up, down in itertools.permutations(linear for linear in linears if linear is not None):
        mlp = _make(kernels, gate, up, down, act)
        if mlp is None:
            continue
        width, dtype = down.num_outputs, down.dtype
        rows = torch.randn(4, width, generator=torch.Generator().manual_seed(width)).to(dtype)
        try:
            expected = module(rows)
        except (RuntimeError, TypeError, ValueError, AttributeError):
            return None
        if isinstance(expected, torch.Tensor) and agree(mlp(rows), expected):
            return mlp
    return None


def _make(kernels: CpuKernels, gate: CpuLinear, up: CpuLinear, down: CpuLinear, act: Curve) -> CpuMlp | None:
    """None where the sizes do not go together, or the kernels do not compute such an expert."""
    sizes = [(linear.num_outputs, linear.num_inputs) for linear in (gate, up)]
    biases = [linear.bias_N for linear in (gate, up)]
    if sizes != [(down.num_inputs, down.num_outputs)] * 2 or (biases[0] is None) != (biases[1] is None):
        return None
    hidden = down.num_inputs
    math = ExpertMath(
        activate=lambda rows: act(rows[..., :hidden]) * rows[..., hidden:],
        up_bias_EF=None if biases[0] is None or biases[1] is None else torch.cat([biases[0], biases[1]])[None],
        down_bias_ED=None if down.bias_N is None else down.bias_N[None],
        post_norm=None,
        transposed=False,
        dtype=down.dtype,
    )
    weights = ExpertWeights(up=(gate.matrix.weight, up.matrix.weight), down=(down.matrix.weight,))
    return CpuMlp(kernels, math, weights, max_rows=MAX_ROWS) if kernels.supports(math, weights) is None else None


class MlpStep:
    """The `forward` of one MLP."""

    def __init__(self, module: nn.Module, mlp: CpuMlp) -> None:
        self._module, self.mlp, self._original = module, mlp, type(module).forward
        self._hooks = Hooks(child for child in module.modules() if child is not module)

    def forward(self, x: torch.Tensor | None = None, **named: torch.Tensor) -> torch.Tensor:
        """As the module's own, for a few rows by the kernels."""
        few = x is not None and not named and self.mlp.takes(x)
        if torch.compiler.is_dynamo_compiling() or torch.is_grad_enabled() or not few or not self._hooks.may_pass:
            module = self._module
            result: torch.Tensor = self._original(module, **named) if x is None else self._original(module, x, **named)
            return result
        assert x is not None
        return self.mlp(x)
