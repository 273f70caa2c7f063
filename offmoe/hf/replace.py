"""Linears and RMS norms computed by the CPU kernels for a few rows; for more, by the model's own code.

torch reads 16-bit weights at a quarter of the memory's speed when there are few rows, and a norm of one token is ten of
its operations. So modules are replaced, in their parents, by modules of our own classes, which share the parameters,
buffers and hooks of those before:

- linears (`nn.Linear`), checked against torch on random rows;
- RMS norms, recognised by the numbers that they give for random rows, whatever they are called;
- depthwise convolutions in 16 bits, on processors without instructions for them: there torch takes one channel after
  the other, 190 ms for 64 tokens of 8,192 channels. They are computed in float32.

A module that fails its check stays. Under torch.compile and where gradients are wanted the model's own code runs.
"""

from __future__ import annotations

import copyreg
import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from offmoe.formats.quantised import QuantMatrix
from offmoe.hf.torch_threads import TorchThreads
from offmoe.kernels.cpu.decode import NORM_KINDS, CpuLinear, CpuNorm
from offmoe.kernels.cpu.kernels import CpuKernels
from offmoe.kernels.cpu.matrices import Weight, unreadable
from offmoe.kernels.products import float32_is_faster, most_rows
from offmoe.kernels.row_blocks import in_row_blocks

# Rows that linears are computed for; of norms, numbers. More are torch's, which uses all cores for them.
MAX_NORM_NUMBERS = 1 << 17
# How far results may be apart, relative to the largest: a rounding of the output, or another order of a sum.
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
_NORM_EPS = ("variance_epsilon", "eps", "epsilon")
_OWN = ("_original", "_kernel", "_places", "_threads")


class KernelLinear(nn.Linear):
    """A linear of ours. `quant_matrix`: its weights, where they stay quantised."""

    quant_matrix: QuantMatrix | None = None


class ReplacedModule(nn.Module):
    """A module in the place of another, whose class its copies have: kernels know weights by their addresses."""

    _original: nn.Module
    _places: tuple[tuple[str, torch.Tensor | None, int], ...]

    def take_place(self, original: nn.Module, kernel: CpuLinear | CpuNorm | None) -> None:
        """Share the parameters, buffers, hooks and settings of `original`. `kernel`, if any, computes the same."""
        places = tuple((name, tensor, _place(tensor)) for name, tensor in original._parameters.items())
        self.__dict__.update(original.__dict__, _original=original, _kernel=kernel, _places=places)

    def has_same_weights(self) -> bool:
        """The parameters are those that the kernel knows, in the same memory: a program may put others there."""
        parameters = self._parameters
        return all(
            parameters.get(name) is tensor and (tensor is None or tensor.data_ptr() == place)
            for name, tensor, place in self._places
        )

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        state = {name: value for name, value in self.__dict__.items() if name not in _OWN}
        return copyreg.__newobj__, (type(self._original),), state  # type: ignore[attr-defined]


class ReplacedLinear(ReplacedModule, KernelLinear):
    """A linear whose few rows the kernels compute."""

    _kernel: CpuLinear
    _threads: TorchThreads

    def __init__(self, original: nn.Linear, kernel: CpuLinear, threads: TorchThreads) -> None:
        """`threads` are torch's, for more rows."""
        self.take_place(original, kernel)
        self.__dict__["_threads"] = threads

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  # its name in nn.Linear
        """Multiply like nn.Linear: (..., K) to (..., N)."""
        if torch.compiler.is_dynamo_compiling() or torch.is_grad_enabled() or not self.has_same_weights():
            return nn.functional.linear(input, self.weight, self.bias)
        if (result := in_row_blocks(self.forward, input)) is not None:
            return result
        kernel = self._kernel
        most = most_rows(input.dtype, in_tiles=kernel.in_tiles)
        if input.numel() > most * kernel.num_inputs or not kernel.takes(input):
            return self._threads.linear(input, self.weight, self.bias)
        return kernel(input)


class ReplacedNorm(ReplacedModule):
    """An RMS norm whose few numbers the kernels compute. A subclass of it is one of the original's class, too."""

    _kernel: CpuNorm

    def __init__(self, original: nn.Module, kernel: CpuNorm) -> None:
        self.take_place(original, kernel)

    def forward(self, x: torch.Tensor | None = None, **named: torch.Tensor) -> torch.Tensor:
        """The normed rows."""
        if x is None:
            (x,) = named.values()
        if (split := in_row_blocks(self.forward, x)) is not None:
            return split
        own_code = torch.compiler.is_dynamo_compiling() or x.numel() > MAX_NORM_NUMBERS or torch.is_grad_enabled()
        if own_code or not self._kernel.takes(x) or not self.has_same_weights():
            result: torch.Tensor = super().forward(x)
            return result
        return self._kernel(x)


class Float32Kernel(torch.Tensor):
    """A convolution's weights in 16 bits. Products with them are computed in float32, and rounded as torch does it."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func is nn.functional.conv1d:
                return _conv1d_in_float32(*args, **named)
        return super().__torch_function__(func, types, args, named)  # type: ignore[no-untyped-call]


class ReplacedConv(ReplacedModule, nn.Conv1d):
    """A depthwise convolution in 16 bits that is computed in float32.

    transformers' mixers do not call it: they give its weight to a function of their own. So it is the weight that knows
    how it is multiplied; it lies where the parameter lies.
    """

    def __init__(self, original: nn.Conv1d) -> None:
        self.take_place(original, None)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The kernel of each channel, (C, 1, taps)."""
        parameter = self._parameters["weight"]
        assert parameter is not None
        own_code = torch.compiler.is_dynamo_compiling() or torch.is_grad_enabled()
        return parameter if own_code else parameter.as_subclass(Float32Kernel)


class ReplacedModules:
    """The modules of one model that were replaced. `counts`: kind -> how many; `remove` puts the originals back.

    `threads` are torch's, for what is left to it.
    """

    def __init__(self, kernels: CpuKernels) -> None:
        self.kernels = kernels
        self.threads = TorchThreads()
        self.counts: Counter[str] = Counter()
        self._replaced: list[tuple[nn.Module, str, ReplacedModule]] = []
        self._norms: dict[type[nn.Module], type[ReplacedNorm]] = {}

    @torch.inference_mode()
    def replace(self, model: nn.Module) -> None:
        """All linears and norms within `model` that pass their checks."""
        made: dict[nn.Module, ReplacedModule | None] = {}  # a module may have several parents
        for parent in list(model.modules()):
            for name, child in parent._modules.items():
                if child is None:
                    continue
                if child not in made:
                    made[child] = self._make(child)
                ours = made[child]
                if ours is not None:
                    setattr(parent, name, ours)
                    self._replaced.append((parent, name, ours))

    def remove(self) -> None:
        """Put the model's own modules back."""
        while self._replaced:
            parent, name, ours = self._replaced.pop()
            if parent._modules.get(name) is ours:
                setattr(parent, name, ours._original)
        self.counts.clear()

    def _make(self, module: nn.Module) -> ReplacedModule | None:
        if "forward" in module.__dict__:
            return None
        if type(module) is nn.Linear:
            linear = make_linear(self.kernels, module)
            rows = None if linear is None else _random_rows(linear.num_inputs, module.weight.dtype)
            if linear is None or rows is None or not agree(linear(rows), module.forward(rows)):
                return None
            self.counts["linears"] += 1
            return ReplacedLinear(module, linear, self.threads)
        if type(module) is nn.Conv1d:
            return self._make_conv(module)
        norm = find_norm(self.kernels, module)
        if norm is None:
            return None
        self.counts["norms"] += 1
        kind = type(module)
        if kind not in self._norms:
            self._norms[kind] = type(f"Native{kind.__name__}", (ReplacedNorm, kind), {"__module__": __name__})
        return self._norms[kind](module, norm)

    def _make_conv(self, module: nn.Conv1d) -> ReplacedConv | None:
        weight = module.weight
        if module.groups != module.in_channels or weight.device.type != "cpu" or not float32_is_faster(weight.dtype):
            return None
        taps = module.dilation[0] * (module.kernel_size[0] - 1) + 1  # inputs that an output looks at
        ours, rows = ReplacedConv(module), _random_rows(2 * taps, weight.dtype)
        rows = rows[:1].expand(module.in_channels, -1)
        if not agree(ours(rows), module.forward(rows)):
            return None
        self.counts["convolutions"] += 1
        return ours


def make_linear(kernels: CpuKernels, module: nn.Linear) -> CpuLinear | None:
    """The linear's weights as the kernels read them; None where they do not."""
    dtype, bias = module.weight.dtype, module.bias
    quantised = module.quant_matrix if isinstance(module, KernelLinear) else None
    weight: Weight = module.weight.detach() if quantised is None else quantised
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
        expected = module.forward(rows)
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


def _conv1d_in_float32(
    input: torch.Tensor,  # noqa: A002  # its name in torch
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *rest: Any,
    **named: Any,
) -> torch.Tensor:
    kernel = weight.as_subclass(torch.Tensor).float()
    result = nn.functional.conv1d(input.float(), kernel, None if bias is None else bias.float(), *rest, **named)
    return result.to(weight.dtype)


def _place(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _random_rows(width: int, dtype: torch.dtype) -> torch.Tensor:
    """Three rows of different sizes, the same each time, without touching torch's default generator.

    The smallest is of the size of a norm's epsilon, and the mean is not zero: a layer norm would subtract it.
    """
    rows = torch.randn(3, width, generator=torch.Generator().manual_seed(width)) + 0.5
    return (rows * torch.tensor([[1e-3], [1.0], [6.0]])).to(dtype)
