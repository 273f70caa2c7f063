"""Steps of a program beside norms, linears and attention: short convolutions, gates, products, against torch."""

from __future__ import annotations

import pytest
import torch
from cpu_cases import LEVELS, needs_library, open_kernels

from offmoe.kernels.activations import Activation
from offmoe.kernels.cpu.delta import set_states
from offmoe.kernels.cpu.mamba import CpuMamba, MambaShape
from offmoe.kernels.cpu.program import CpuProgram, Elementwise
from offmoe.kernels.cpu.short_conv import CpuShortConv, set_state

APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

pytestmark = needs_library


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 7, 1100])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_short_convolution_token_by_token(dtype: torch.dtype, channels: int, has_bias: bool) -> None:
    taps, program = 3, CpuProgram(open_kernels(), 0)
    conv, bias = draw(channels, taps, dtype=dtype), draw(channels, dtype=dtype, seed=1) if has_bias else None
    x, y = program.row(3 * channels, dtype), program.row(channels, dtype)
    short = CpuShortConv(conv, bias)
    state = torch.zeros(1, channels, taps, dtype=dtype)
    assert short.takes(state) and not short.takes(state[..., 1:])
    call = program.conv(short, x, y)
    program.finish()
    set_state(call, state)
    tokens = draw(5, 3, channels, dtype=dtype, seed=2)
    mixed = (tokens[:, 0] * tokens[:, 2]).t()[None]  # (1, channels, tokens)
    padded = torch.nn.functional.pad(mixed, (taps - 1, 0))
    convolved = torch.nn.functional.conv1d(padded, conv[:, None], bias, groups=channels)[0].t()
    for token, inputs in enumerate(tokens):
        x.copy_(inputs.reshape(1, -1))
        program(0)
        torch.testing.assert_close(y[0], inputs[1] * convolved[token])
        assert torch.equal(state[0, :, -1], mixed[0, :, token])


def mixed(shape: MambaShape, x: torch.Tensor, parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """Tokens (T, ...) through the mixer in float64 (Dao and Gu 2024), one after another: (T, H * W)."""
    taps, groups = shape.taps, shape.num_groups
    gate, channels, times = x.double().split([shape.values, shape.channels, shape.num_heads], dim=-1)
    padded = torch.nn.functional.pad(channels.t()[None], (taps - 1, 0))
    silu = torch.nn.functional.silu
    wide = silu(torch.nn.functional.conv1d(padded, parts["conv"][:, None], parts["bias"], groups=shape.channels))[0].t()
    values, keys, queries = wide.split([shape.values, groups * shape.size, groups * shape.size], dim=-1)
    state, rows = torch.zeros(shape.num_heads, shape.width, shape.size, dtype=torch.float64), []
    for token, time in enumerate(torch.nn.functional.softplus(times + parts["time_bias"])):
        value_HW = values[token].view(shape.num_heads, -1)
        key_HS, query_HS = (
            part[token].view(groups, -1).repeat_interleave(shape.num_heads // groups, 0) for part in (keys, queries)
        )
        decay = (-parts["log_rate"].exp() * time).exp()[:, None, None]
        state = state * decay + (time[:, None] * value_HW)[..., None] * key_HS[:, None]
        rows.append((state @ query_HS[..., None])[..., 0] + parts["skip"][:, None] * value_HW)
    gated = torch.stack(rows).view(len(x), groups, -1) * silu(gate).view(len(x), groups, -1)
    return (gated / (gated.square().mean(-1, keepdim=True) + 1e-5).sqrt()).view(len(x), -1) * parts["norm"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(4, 2, 8, 16), (6, 1, 12, 20), (2, 2, 64, 128)])
@pytest.mark.parametrize("level", LEVELS)
def test_a_mamba_mixer_token_by_token(dtype: torch.dtype, sizes: tuple[int, int, int, int], level: str) -> None:
    num_heads, num_groups, width, size = sizes
    shape = MambaShape(num_heads=num_heads, num_groups=num_groups, width=width, size=size, taps=4, dtype=dtype)
    parts = {
        "conv": draw(shape.channels, 4, dtype=dtype), "bias": draw(shape.channels, dtype=dtype, seed=1),
        "norm": draw(shape.values, dtype=dtype, seed=2) + 1, "log_rate": draw(num_heads, dtype=dtype, seed=3),
        "time_bias": draw(num_heads, dtype=dtype, seed=4), "skip": draw(num_heads, dtype=dtype, seed=5),
    }  # fmt: skip
    program = CpuProgram(open_kernels(level), 0)
    x, y = program.row(shape.values + shape.channels + num_heads, dtype), program.row(shape.values, dtype)
    mamba = CpuMamba(
        shape, parts["conv"], parts["bias"], parts["norm"], parts["log_rate"], parts["time_bias"], parts["skip"],
        eps=1e-5,
    )  # fmt: skip
    call = program.mamba(mamba, x, y)
    program.finish()
    states = torch.zeros(1, shape.channels, 4, dtype=dtype), torch.zeros(1, num_heads, width, size)
    assert mamba.takes(*states) and not mamba.takes(states[0], states[1].double())
    set_states(call, *states)
    tokens, ours = draw(6, x.numel(), dtype=dtype, seed=6), []
    for token in tokens:
        x.copy_(token)
        program(0)
        ours.append(y[0].clone())
    exact = mixed(shape, tokens, {name: part.double() for name, part in parts.items()})
    bound = {torch.float32: 1e-5, torch.bfloat16: 6e-2, torch.float16: 1e-2}[dtype]
    assert (torch.stack(ours).double() - exact).abs().max() < bound * exact.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("width", [1, 10, 1000])
def test_a_gate_between_two_rows(dtype: torch.dtype, kind: str, width: int) -> None:
    program = CpuProgram(open_kernels(), 0)
    gate, up, to = (program.row(width, dtype) for _ in range(3))
    program.activate(Activation(kind=kind, gated=True), gate, up, to)
    program.finish()
    gate.copy_(draw(1, width, dtype=dtype))
    up.copy_(draw(1, width, dtype=dtype, seed=1))
    program(0)
    functional = torch.nn.functional
    curve = functional.silu(gate) if kind == "silu" else functional.gelu(gate, approximate=APPROXIMATE[kind])
    torch.testing.assert_close(to, curve * up)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("what", ["gate", "gate_softplus", "multiply", "sum"])
@pytest.mark.parametrize("sizes", [(1, 1), (96, 1), (96, 4), (96, 96), (1200, 3), (1200, 600)])
def test_numbers_that_neighbours_share(dtype: torch.dtype, what: Elementwise, sizes: tuple[int, int]) -> None:
    width, num_shared = sizes
    program = CpuProgram(open_kernels(), 0)
    x, y = program.row(width, dtype), program.row(num_shared, dtype)
    program.numbers(what, x, y, x)
    program.finish()
    given = draw(1, width, dtype=dtype)
    x.copy_(given)
    y.copy_(draw(1, num_shared, dtype=dtype, seed=1) * 12)
    program(0)
    factor = {
        "gate": y.sigmoid(), "gate_softplus": torch.nn.functional.softplus(y.float()).to(dtype), "multiply": y,
        "sum": y,
    }[what].repeat_interleave(width // num_shared, dim=-1)  # fmt: skip
    torch.testing.assert_close(x, given + factor if what == "sum" else given * factor)
