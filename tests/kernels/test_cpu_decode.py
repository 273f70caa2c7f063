"""Norms, linears and one token's attention by the CPU kernels, against the formulas in float64, at every level."""

from __future__ import annotations

import math

import pytest
import torch
from cpu_cases import needs_library, open_kernels

from offmoe.kernels.cpu.decode import NORM_KINDS, AttentionShape, CpuAttention, CpuLinear, CpuNorm, NormKind
from offmoe.kernels.cpu.kernels import CpuKernels

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of the largest number: one rounding of the output, and of what is rounded on the way.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}

pytestmark = needs_library


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def assert_near(ours: torch.Tensor, exact: torch.Tensor) -> None:
    bound = TOLERANCE[ours.dtype] * exact.abs().max().item()
    assert (ours.double() - exact).abs().max().item() <= bound


def normed(x: torch.Tensor, weight: torch.Tensor, eps: float, kind: NormKind) -> torch.Tensor:
    """In float64, without roundings."""
    x, weight = x.double(), weight.double()
    if kind == "centred":
        return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, torch.full_like(weight, 0.25), eps)
    factor = 1 + weight if kind == "one_plus_weight" else weight
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * factor


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", NORM_KINDS)
@pytest.mark.parametrize("width", [1, 7, 64, 100, 2048])
def test_norms(kernels: CpuKernels, dtype: torch.dtype, kind: NormKind, width: int) -> None:
    x, weight = draw(2, 3, width, dtype=dtype) * 3, draw(width, dtype=dtype)
    bias = torch.full_like(weight, 0.25) if kind == "centred" else None
    norm = CpuNorm(kernels, weight, eps=1e-3, kind=kind, bias_D=bias)
    assert norm.takes(x)
    assert_near(norm(x), normed(x, weight, 1e-3, kind))
    assert torch.equal(norm(x)[1, 2], norm(x[1:2, 2:3].contiguous())[0, 0])  # a row depends on itself alone


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_linears(kernels: CpuKernels, dtype: torch.dtype, has_bias: bool) -> None:
    weight, x = draw(37, 100, dtype=dtype), draw(1, 5, 100, dtype=dtype)
    bias = draw(37, dtype=dtype) if has_bias else None
    linear = CpuLinear(kernels, weight, bias, dtype=dtype)
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert linear(x).shape == (1, 5, 37)
    assert_near(linear(x), exact)
    assert not linear.takes(x[..., :50])
    assert not linear.takes(x.transpose(1, 2))


def rotated(x_HW: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    size = cos.shape[-1]
    turning, rest = x_HW[..., :size], x_HW[..., size:]
    first, second = turning.chunk(2, dim=-1)
    return torch.cat([turning * cos + torch.cat([-second, first], dim=-1) * sin, rest], dim=-1)


class Case:
    """One token's attention, and its result in float64."""

    def __init__(
        self, *, dtype: torch.dtype, num_heads: int = 6, num_groups: int = 2, width: int = 40, num_rows: int = 50,
        num_angles: int = 40, half: bool = False, norm: str = "none", has_sinks: bool = False,
        cap: float | None = None,
    ) -> None:  # fmt: skip
        self.shape = AttentionShape(
            num_heads=num_heads, num_groups=num_groups, width=width, value_width=width, scale=width**-0.5, dtype=dtype,
            cap=cap,
        )  # fmt: skip
        self.query, self.key = draw(num_heads * width, dtype=dtype), draw(num_groups * width, dtype=dtype, seed=1)
        self.value = draw(num_groups * width, dtype=dtype, seed=2)
        # Caches with room for more rows, as the engine has them.
        self.keys = draw(num_groups, num_rows + 3, width, dtype=dtype, seed=3)[:, :num_rows]
        self.values = draw(num_groups, num_rows + 3, width, dtype=dtype, seed=4)[:, :num_rows]
        angles = draw(num_angles // (2 if half else 1), dtype=torch.float32)
        self.cos, self.sin, self.half = angles.cos().to(dtype), angles.sin().to(dtype), half
        widths = {"none": (0, 0), "head": (width, width), "all": (num_heads * width, num_groups * width)}[norm]
        self.norms = [draw(w, dtype=dtype, seed=5) + 1 if w else None for w in widths]
        self.sinks = draw(num_heads, dtype=dtype, seed=6) if has_sinks else None

    def run(self, kernels: CpuKernels) -> torch.Tensor:
        norms = [None if w is None else CpuNorm(kernels, w, eps=1e-6, kind="weight_last") for w in self.norms]
        attention = CpuAttention(kernels, self.shape, query_norm=norms[0], key_norm=norms[1], sinks_H=self.sinks)
        self.keys[:, -1] = self.values[:, -1] = math.nan  # the new row is written, not read
        return attention(
            self.query, self.key, self.value, self.cos, self.sin, self.keys, self.values, half_angles=self.half
        )

    def exact(self) -> torch.Tensor:
        """After `run`: rows before the last are as they were."""
        shape = self.shape
        query, key = (
            (x.double() if w is None else normed(x.view(-1, len(w)), w, 1e-6, "weight_last")).reshape(-1, shape.width)
            for x, w in zip((self.query, self.key), self.norms, strict=True)
        )
        cos, sin = (torch.cat([x, x]) if self.half else x for x in (self.cos.double(), self.sin.double()))
        query, key = rotated(query, cos, sin), rotated(key, cos, sin)
        keys, values = self.keys.double().clone(), self.values.double().clone()
        keys[:, -1], values[:, -1] = key, self.value.double().view(shape.num_groups, -1)
        per_group = shape.num_heads // shape.num_groups
        scores = (query.view(shape.num_groups, per_group, -1) @ keys.transpose(1, 2)) * shape.scale
        if shape.cap is not None:
            scores = shape.cap * (scores / shape.cap).tanh()
        if self.sinks is not None:
            sinks = self.sinks.double().view(shape.num_groups, per_group, 1)
            return (torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1] @ values).reshape(-1)
        return (scores.softmax(-1) @ values).reshape(-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        {}, {"norm": "head"}, {"norm": "all"}, {"has_sinks": True}, {"half": True}, {"num_angles": 16},
        {"num_rows": 1}, {"num_heads": 2}, {"width": 64, "num_angles": 64, "num_rows": 300},
        # Several chunks of rows, and groups of 15 and of 8 heads: each number of heads that is computed together.
        {"num_heads": 15, "num_groups": 1, "num_rows": 700, "has_sinks": True},
        {"num_heads": 16, "width": 128, "num_angles": 128, "num_rows": 257},
        # More rows than 64 chunks of 256.
        {"num_heads": 1, "num_groups": 1, "width": 16, "num_angles": 16, "num_rows": 16500},
        # Scores on both sides of where tanh is no polynomial any more, and beyond the cap.
        {"cap": 1.5}, {"num_heads": 15, "num_groups": 1, "num_rows": 300, "cap": 0.5}, {"cap": 30.0},
    ],
    ids=str,
)  # fmt: skip
def test_attention_of_one_token(kernels: CpuKernels, dtype: torch.dtype, options: dict[str, object]) -> None:
    case = Case(dtype=dtype, **options)  # type: ignore[arg-type]
    output = case.run(kernels)
    assert_near(output, case.exact())
    shape = case.shape
    assert torch.equal(case.values[:, -1].flatten(), case.value)
    assert not case.keys[:, -1].isnan().any()
    assert output.shape == (shape.num_heads * shape.value_width,)


def test_the_number_of_threads_changes_no_bit() -> None:
    outputs = []
    for threads in (1, 2):
        kernels = open_kernels(threads=threads)
        outputs.append(Case(dtype=torch.bfloat16, num_heads=8, num_groups=4, width=64, num_rows=900).run(kernels))
        kernels.close()
    assert torch.equal(*outputs)
