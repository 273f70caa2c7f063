"""A gated delta net's token, against the recurrence in torch: widths that fill no vector, and long ones."""

from __future__ import annotations

import pytest
import torch
from cpu_cases import LEVELS, needs_library, open_kernels
from torch.nn.functional import conv1d, silu, softplus

from offmoe.kernels.cpu.delta import CpuDelta, DeltaInput, DeltaShape, set_states
from offmoe.kernels.cpu.program import CpuProgram

pytestmark = needs_library

# Key heads, value heads, a key's width, a value's, taps: Qwen3.5; few; wider than the columns taken at once; 64.
SHAPES = [(2, 4, 128, 128, 4), (1, 3, 7, 20, 3), (2, 2, 9, 309, 2), (1, 1, 2, 530, 64)]
EPS, NUM_TOKENS = 1e-6, 3


def expected(
    shape: DeltaShape, rows: dict[str, torch.Tensor], conv_CT: torch.Tensor, norm_V: torch.Tensor,
    rate_H: torch.Tensor, bias_H: torch.Tensor, conv_state: torch.Tensor, state: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """The heads of one token, float32; the states are changed."""
    mixed = torch.cat([rows[name].flatten() for name in ("query", "key", "value")])
    conv_state.copy_(torch.cat([conv_state[..., 1:], mixed.view(1, -1, 1)], dim=-1))
    mixed = silu(conv1d(conv_state, conv_CT.unsqueeze(1), groups=shape.channels).flatten())
    keys, times = shape.num_keys * shape.key_width, shape.num_values // shape.num_keys
    query, key = (mixed[at : at + keys].view(shape.num_keys, -1).repeat_interleave(times, 0) for at in (0, keys))
    query, key = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (query, key))
    value = mixed[2 * keys :].view(shape.num_values, -1)
    decay = torch.exp(-rate_H.exp() * softplus(rows["decay"].flatten() + bias_H))
    state *= decay.view(1, -1, 1, 1)
    added = (value - torch.einsum("hkv,hk->hv", state[0], key)) * rows["beta"].flatten().sigmoid().unsqueeze(-1)
    state += torch.einsum("hk,hv->hkv", key, added)
    out = torch.einsum("hkv,hk->hv", state[0], query) * shape.key_width**-0.5
    out = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + EPS) * norm_V
    return out * silu(rows["gate"].view(shape.num_values, -1))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("sizes", SHAPES)
def test_tokens_are_those_of_the_recurrence(sizes: tuple[int, ...], level: str) -> None:
    torch.manual_seed(3)
    num_keys, num_values, key_width, value_width, taps = sizes
    shape = DeltaShape(
        num_keys=num_keys, num_values=num_values, key_width=key_width, value_width=value_width, taps=taps,
        dtype=torch.float32,
    )  # fmt: skip
    widths = {
        "query": num_keys * key_width, "key": num_keys * key_width, "value": num_values * value_width,
        "gate": num_values * value_width, "beta": num_values, "decay": num_values,
    }  # fmt: skip
    times = num_values // num_keys
    strides = {"query": key_width, "key": key_width, "value": times * value_width, "gate": times * value_width}
    weights = (
        torch.randn(shape.channels, taps),
        torch.rand(value_width),
        torch.randn(num_values),
        torch.randn(num_values),
    )
    conv_state, state = torch.randn(1, shape.channels, taps), torch.randn(1, num_values, key_width, value_width)
    wanted_states = conv_state.clone(), state.clone()
    kernels = open_kernels(level)
    delta = CpuDelta(shape, *weights, eps=EPS)
    program = CpuProgram(kernels, 0)
    rows = {name: program.row(width, torch.float32) for name, width in widths.items()}
    y = program.row(num_values * value_width, torch.float32)
    inputs = {name: DeltaInput(row=row, begin=0, stride=strides.get(name, times)) for name, row in rows.items()}
    call = program.delta(delta, inputs, y)
    set_states(call, conv_state, state)
    program.finish()
    for _ in range(NUM_TOKENS):
        for row in rows.values():
            row.normal_()
        wanted = expected(shape, rows, *weights, *wanted_states)
        program(0)
        torch.testing.assert_close(y.view_as(wanted), wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close((conv_state, state), wanted_states, rtol=1e-4, atol=1e-4)
    kernels.close()
