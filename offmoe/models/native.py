"""Linears and RMS norms computed by the CPU kernels for a few rows; for more, the model's own code stays.

torch reads 16-bit weights at a quarter of the memory's speed when there are few rows, and a norm of one token is ten of
its operations. A module's `forward` is replaced, on the module itself:

- linears (`nn.Linear`): checked against torch on random rows when they are replaced;
- RMS norms, recognised by what they do to random rows, whatever they are called.

A module that fails its check stays as it is. Under torch.compile and where gradients are wanted the original runs.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from typing import cast

import torch
from torch import nn

from offmoe.kernels.cpu.decode import NORM_KINDS, CpuLinear, CpuNorm
from offmoe.kernels.cpu.kernels import CpuKernels
from offmoe.kernels.cpu.matrices import Weight, unreadable
from offmoe.models.torch_threads import TorchThreads

# Rows that linears are computed for; of norms, numbers. More are torch's, which uses all cores for them.
MAX_ROWS = 16
MAX_NORM_NUMBERS = 1 << 17
# How far results may be apart, relative to the largest: a rounding of the output, or another order of a sum.
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
# Where a linear that stays quantised (quantised_linears.py) has its QuantMatrix.
MATRIX_NAME = "offmoe_matrix"
_NORM_EPS = ("variance_epsilon", "eps", "epsilon")

Forward = Callable[..., torch.Tensor]


class NativeModules:
    """The modules of one model that were swapped. `counts`: kind -> how many; `remove` puts the originals back.

    `threads` are torch's, for what is left to it.
    """

    def __init__(self, kernels: CpuKernels) -> None:
        self.kernels = kernels
        self.threads = TorchThreads()
        self.counts: Counter[str] = Counter()
        self._swapped: list[nn.Module] = []

    def swap(self, module: nn.Module, forward: Callable[..., object], kind: str) -> None:
        """From now on `module` runs `forward`."""
        module.__dict__["forward"] = forward
        self._swapped.append(module)
        self.counts[kind] += 1

    def remove(self) -> None:
        """As before."""
        while self._swapped:
            self._swapped.pop().__dict__.pop("forward", None)
        self.counts.clear()

    @torch.inference_mode()
    def swap_simple(self, model: nn.Module) -> None:
        """All linears and norms of `model` that pass their checks."""
        for module in model.modules():
            if "forward" in module.__dict__ or module._forward_hooks:
                continue
            if type(module) is nn.Linear:
                self._swap_linear(module)
            else:
                self._swap_norm(module)

    def _swap_linear(self, module: nn.Linear) -> None:
        linear = make_linear(self.kernels, module)
        if linear is None:
            return
        rows = _random_rows(linear.num_inputs, module.weight.dtype)
        if agree(linear(rows), module(rows)):
            self.swap(module, _linear_forward(module, linear, self.threads), "linears")

    def _swap_norm(self, module: nn.Module) -> None:
        norm = find_norm(self.kernels, module)
        if norm is not None:
            self.swap(module, _norm_forward(module, norm), "norms")


def make_linear(kernels: CpuKernels, module: nn.Linear) -> CpuLinear | None:
    """The linear's weights as the kernels read them; None where they do not."""
    dtype, bias = module.weight.dtype, module.bias
    weight: Weight = module.__dict__.get(MATRIX_NAME, module.weight.detach())
    if isinstance(weight, torch.Tensor) and (weight.is_meta or not weight.is_contiguous()):
        return None
    if unreadable(weight, dtype) is not None:
        return None
    if bias is not None and (bias.dtype != dtype or bias.device.type != "cpu" or not bias.is_contiguous()):
        return None
    return CpuLinear(kernels, weight, None if bias is None else bias.detach(), dtype=dtype)


def find_norm(kernels: CpuKernels, module: nn.Module) -> CpuNorm | None:
    """The RMS norm that `module` is, by its numbers; None for anything else."""
    params = dict(module.named_parameters(recurse=False))
    eps = next((getattr(module, name) for name in _NORM_EPS if isinstance(getattr(module, name, None), float)), None)
    if set(params) != {"weight"} or eps is None or any(True for _ in module.children()):
        return None
    if len(inspect.signature(type(module).forward).parameters) != 2:  # a gate beside the rows, as some norms have
        return None
    weight = params["weight"].detach()
    if weight.dim() != 1 or weight.device.type != "cpu" or weight.dtype not in TOLERANCES:
        return None
    rows = _random_rows(weight.numel(), weight.dtype)
    try:
        expected = module(rows)
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return None
    if not isinstance(expected, torch.Tensor) or expected.shape != rows.shape or expected.dtype != rows.dtype:
        return None
    norms = [CpuNorm(kernels, weight.contiguous(), eps=eps, kind=kind) for kind in NORM_KINDS]
    errors = [(norm(rows).float() - expected.float()).abs().mean().item() for norm in norms]
    best = norms[errors.index(min(errors))]
    return best if agree(best(rows), expected) else None


def agree(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Equal up to rounding: the mean error is a tenth of what a single one may be."""
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    tolerance, largest = TOLERANCES[ours.dtype], theirs.float().abs().max().item()
    error = (ours.float() - theirs.float()).abs()
    return bool(error.max() <= tolerance * largest and error.mean() <= tolerance / 10 * largest)


def _linear_forward(module: nn.Linear, linear: CpuLinear, threads: TorchThreads) -> Forward:
    most, weight, bias, are_same = MAX_ROWS * linear.num_inputs, module.weight, module.bias, _as_now(module)

    def forward(input: torch.Tensor) -> torch.Tensor:  # noqa: A002  # its name in nn.Linear
        x = input
        if torch.compiler.is_dynamo_compiling() or torch.is_grad_enabled() or not are_same():
            return nn.functional.linear(x, module.weight, module.bias)
        if x.numel() > most or not linear.takes(x):
            return threads.linear(x, weight, bias)
        return linear(x)

    return forward


def _as_now(module: nn.Module) -> Callable[[], bool]:
    """A function that says whether the module's parameters are what they are now, in the memory where they are now: a
    program may put others there, and the kernels know places.
    """
    parameters = module._parameters
    known = [(name, tensor, None if tensor is None else tensor.data_ptr()) for name, tensor in parameters.items()]

    def are_same() -> bool:
        return all(
            parameters.get(name) is tensor and (tensor is None or tensor.data_ptr() == place)
            for name, tensor, place in known
        )

    return are_same


def _norm_forward(module: nn.Module, norm: CpuNorm) -> Forward:
    original, are_same = cast("Forward", module.forward), _as_now(module)

    def forward(x: torch.Tensor | None = None, **named: torch.Tensor) -> torch.Tensor:
        if x is None:
            (x,) = named.values()
        if torch.compiler.is_dynamo_compiling() or x.numel() > MAX_NORM_NUMBERS or torch.is_grad_enabled():
            return original(x)
        return norm(x) if norm.takes(x) and are_same() else original(x)

    return forward


def _random_rows(width: int, dtype: torch.dtype) -> torch.Tensor:
    """Three rows of different sizes, the same each time, without touching torch's default generator.

    The smallest is of the size of a norm's epsilon, and the mean is not zero: a layer norm would subtract it.
    """
    rows = torch.randn(3, width, generator=torch.Generator().manual_seed(width)) + 0.5
    return (rows * torch.tensor([[1e-3], [1.0], [6.0]])).to(dtype)
