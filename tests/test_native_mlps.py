"""Dense and shared MLPs in one call of the CPU kernels: which are taken, and that they give what the module gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from offmoe.kernels.cpu.loader import load_cpu_kernels, usable_levels
from offmoe.models.native import MAX_ROWS, TOLERANCES, NativeModules
from offmoe.models.native_mlp import swap_mlps

LEVELS = usable_levels()

pytestmark = pytest.mark.skipif(not LEVELS, reason="the CPU kernels were not built")


class Mlp(nn.Module):
    """Names that say nothing: which linear is which is found out."""

    def __init__(self, act: Callable[[torch.Tensor], torch.Tensor], *, bias: bool = False, hidden: int = 40) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w2 = nn.Linear(hidden, 64, bias=bias)
        self.w3, self.w1 = nn.Linear(64, hidden, bias=bias), nn.Linear(64, hidden, bias=bias)
        self.act_fn = act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(self.act_fn(self.w1(x)) * self.w3(x))


class Doubled(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def swapped(mlp: nn.Module, level: str = "auto") -> NativeModules:
    kernels, _ = load_cpu_kernels(level)
    assert kernels is not None
    native = NativeModules(kernels)
    native.swap_simple(mlp)
    swap_mlps(native, mlp)
    return native


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("hidden", [40, 64])
@torch.inference_mode()
def test_as_the_module(level: str, dtype: torch.dtype, bias: bool, hidden: int) -> None:
    mlp = Mlp(nn.functional.silu, bias=bias, hidden=hidden).to(dtype)
    x = torch.randn(1, MAX_ROWS, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = mlp(x)
    native = swapped(mlp, level)
    assert native.counts["mlps"] == 1
    bound = TOLERANCES[dtype] * expected.float().abs().max()
    assert (mlp(x).float() - expected.float()).abs().max() <= bound
    assert torch.equal(mlp(x[:, 3:4].contiguous()), mlp(x)[:, 3:4])  # a row depends on itself alone
    native.remove()
    assert torch.equal(mlp(x), expected)


@pytest.mark.parametrize("mlp", [Doubled(nn.functional.silu), Mlp(lambda x: x.sin() * x), nn.Linear(4, 4)])
def test_what_computes_something_else_is_left_alone(mlp: nn.Module) -> None:
    assert swapped(mlp).counts["mlps"] == 0


def test_many_rows_gradients_and_hooks_are_for_the_module() -> None:
    mlp, seen = Mlp(nn.functional.silu), list[int]()
    native = swapped(mlp)
    calls = native.kernels.run_experts
    native.kernels.run_experts = lambda address: (seen.append(1), calls(address))[1]
    with torch.inference_mode():
        mlp(torch.zeros(MAX_ROWS + 1, 64))
        handle = mlp.w1.register_forward_hook(lambda *_: None)
        mlp(torch.zeros(1, 64))
        handle.remove()
    mlp(torch.ones(1, 64)).sum().backward()
    assert mlp.w1.weight.grad is not None
    assert not seen
    with torch.inference_mode():
        mlp(torch.zeros(1, 64))
    assert seen
