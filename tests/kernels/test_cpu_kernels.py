"""The library of CPU kernels against plain torch: every level that this processor has, every type, odd shapes."""

from __future__ import annotations

import ctypes
import itertools
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cpu_cases import linear, needs_library, open_kernels
from slot_cases import clamped_gate, gelu_gate, gelu_tanh_gate, relu_squared, silu_gate

from offmoe.core.errors import UsageError
from offmoe.formats.dense import ExpertWeights
from offmoe.kernels.cpu import CpuKernels, ExpertRows, load_cpu_kernels, structs
from offmoe.kernels.cpu.decode import CpuTokenExperts
from offmoe.kernels.reference import ExpertMath, combine_rows, experts_forward

pytestmark = needs_library

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of the largest value: rounding once more or once less.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


GATED = (silu_gate, gelu_gate, gelu_tanh_gate, clamped_gate)
PLAIN = (relu_squared, torch.nn.functional.silu, torch.nn.functional.gelu)


class Layer:
    """Random experts and what the reference makes of them. D width, F hidden, E experts."""

    def __init__(
        self, dtype: torch.dtype, activate: Callable[[torch.Tensor], torch.Tensor], *, width: int = 100,
        hidden: int = 37, biases: bool = False, transposed: bool = False, split: bool = False, num_experts: int = 5,
    ) -> None:  # fmt: skip
        torch.manual_seed(7)
        outputs = 2 * hidden if activate in GATED else hidden
        self.width, self.num_experts = width, num_experts
        self.math = ExpertMath(
            activate=activate,
            up_bias_EF=torch.randn(num_experts, outputs).to(dtype) if biases else None,
            down_bias_ED=torch.randn(num_experts, width).to(dtype) if biases else None,
            post_norm=None,
            transposed=transposed,
            dtype=dtype,
        )
        self.weights = []
        for _ in range(num_experts):
            up, down = torch.randn(outputs, width) / width**0.5, torch.randn(width, hidden) / hidden**0.5
            ups = (up[:hidden], up[hidden:]) if split else (up,)
            self.weights.append(
                ExpertWeights(tuple(self._stored(part, dtype) for part in ups), (self._stored(down, dtype),))
            )

    def _stored(self, matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return (matrix.t() if self.math.transposed else matrix).to(dtype).contiguous()

    def rows(self, num_tokens: int, top_k: int) -> list[ExpertRows]:
        ids_TK = torch.stack([torch.randperm(self.num_experts)[:top_k] for _ in range(num_tokens)])
        found = []
        for expert_idx, weights in enumerate(self.weights):
            tokens, ranks = (ids_TK == expert_idx).nonzero(as_tuple=True)
            if len(tokens):
                found.append((expert_idx, weights, tokens.tolist(), (tokens * top_k + ranks).tolist()))
        return found

    def expected(self, rows: list[ExpertRows], x_TD: torch.Tensor, num_choices: int) -> torch.Tensor:
        y_SD = torch.zeros(num_choices, self.width, dtype=self.math.dtype)
        for expert_idx, weights, tokens, choices in rows:
            y_SD[list(choices)] = experts_forward(self.math, [(expert_idx, weights, x_TD[list(tokens)])])
        return y_SD

    def computed(
        self, kernels: CpuKernels, rows: list[ExpertRows], x_TD: torch.Tensor, num_choices: int
    ) -> torch.Tensor:
        assert kernels.supports(self.math, self.weights[0]) is None
        y_SD = torch.zeros(num_choices, self.width, dtype=self.math.dtype)
        kernels.experts(kernels.layer(self.math, self.weights[0]), rows, x_TD, y_SD)
        return y_SD


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    limit = TOLERANCES[expected.dtype] * float(expected.abs().max())
    assert torch.isfinite(got).all()
    assert float((got - expected).abs().max()) <= limit, f"{(got - expected).abs().max()} > {limit}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activate", [*GATED, *PLAIN])
def test_every_activation(
    kernels: CpuKernels, dtype: torch.dtype, activate: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    layer = Layer(dtype, activate, biases=True)
    x_TD = torch.randn(4, layer.width).to(dtype)
    rows = layer.rows(4, 2)
    assert_close(layer.computed(kernels, rows, x_TD, 8), layer.expected(rows, x_TD, 8))


@pytest.mark.parametrize(
    ("width", "hidden", "biases", "transposed", "split"),
    [
        (1, 1, False, False, False),
        (257, 300, True, False, True),
        (128, 64, False, True, False),
        (70, 33, True, True, True),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes_and_layouts(
    kernels: CpuKernels, dtype: torch.dtype, width: int, hidden: int, biases: bool, transposed: bool, split: bool
) -> None:
    layer = Layer(dtype, silu_gate, width=width, hidden=hidden, biases=biases, transposed=transposed, split=split)
    x_TD = torch.randn(9, width).to(dtype)
    rows = layer.rows(9, 3)
    assert_close(layer.computed(kernels, rows, x_TD, 27), layer.expected(rows, x_TD, 27))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_depends_on_itself_alone(kernels: CpuKernels, dtype: torch.dtype) -> None:
    layer = Layer(dtype, silu_gate, width=300, hidden=70)
    x_TD = torch.randn(37, layer.width).to(dtype)
    alone = open_kernels(kernels.level, threads=1)
    for num_rows in (*range(1, 18), 37):
        rows: list[ExpertRows] = [(1, layer.weights[1], list(range(num_rows)), list(range(num_rows)))]
        together = layer.computed(kernels, rows, x_TD, num_rows)
        for row in {0, num_rows - 1}:
            one = layer.computed(alone, [(1, layer.weights[1], [row], [0])], x_TD, 1)
            assert torch.equal(together[row], one[0]), f"{num_rows=} {row=}"


@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_weighted_sum_is_torchs(kernels: CpuKernels, dtype: torch.dtype, weights_dtype: torch.dtype) -> None:
    layer = Layer(dtype, silu_gate, width=600)
    x_1D, weights_1K = torch.randn(1, 600).to(dtype), torch.rand(1, 3).to(weights_dtype)
    rows: list[ExpertRows] = [(idx, layer.weights[idx], [0], [choice]) for choice, idx in enumerate((4, 0, 2))]
    y_KD = layer.computed(kernels, rows, x_1D, 3)
    token = CpuTokenExperts(kernels, kernels.layer(layer.math, layer.weights[0]), 3, x_1D, weights_1K)
    total = token([idx for idx, *_ in rows], [weights for _, weights, *_ in rows], x_1D, weights_1K)
    assert total.dtype == dtype
    assert_close(total, combine_rows(y_KD, weights_1K, dtype))


def test_an_expert_that_moved_is_read_where_it_lies(kernels: CpuKernels) -> None:
    layer = Layer(torch.float32, silu_gate)
    plan, x_TD = kernels.layer(layer.math, layer.weights[0]), torch.randn(1, layer.width)
    for weights in layer.weights:
        y_SD = torch.zeros(1, layer.width)
        kernels.experts(plan, [(3, weights, [0], [0])], x_TD, y_SD)
        assert_close(y_SD, experts_forward(layer.math, [(3, weights, x_TD)]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(kernels: CpuKernels, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    for (num_outputs, num_inputs), num_rows in itertools.product(((1, 1), (33, 100), (700, 257)), (1, 2, 5, 16)):
        weight, bias = torch.randn(num_outputs, num_inputs).to(dtype), torch.randn(num_outputs).to(dtype)
        x_TK = torch.randn(num_rows, num_inputs + 3).to(dtype)[:, :num_inputs]
        for stored in (weight, weight.t().contiguous().t()):
            got = linear(kernels, x_TK, stored, bias)
            assert_close(got, torch.nn.functional.linear(x_TK, weight, bias))


def test_what_is_not_supported_is_said(kernels: CpuKernels) -> None:
    layer = Layer(torch.bfloat16, lambda up: torch.sin(up[..., :37]))
    reason = kernels.supports(layer.math, layer.weights[0])
    assert reason is not None and "activation" in reason
    weights = Layer(torch.float32, silu_gate).weights[0]
    reason = kernels.supports(layer.math, weights)
    assert reason is not None and "torch.float32 weights" in reason


def test_levels_are_chosen_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFMOE_CPU_KERNELS", "portable")
    kernels, _ = load_cpu_kernels()
    assert kernels is not None and repr(kernels).startswith("<CpuKernels portable, ")
    assert load_cpu_kernels("off") == (None, "switched off")
    with pytest.raises(UsageError, match="is one of auto, avx512, avx2, neon_dot, neon, portable, off"):
        load_cpu_kernels("sse9")


def test_more_threads_than_cores_are_capped() -> None:
    kernels, note = load_cpu_kernels("portable", threads=10_000)
    assert kernels is not None and kernels.num_threads < 10_000
    assert note.startswith("10000 threads were asked for")


class Norm(ctypes.Structure):
    """A wrong mirror: of the right size, with two fields of one width in each other's place."""

    _fields_ = [
        ("width", ctypes.c_int64) if name == "rows" else ("rows", ctypes.c_int64) if name == "width" else (name, kind)
        for name, kind in structs.CNorm._fields_
    ]


class Linear(ctypes.Structure):
    """A wrong mirror: one field is narrower."""

    _fields_ = [(name, ctypes.c_int16 if name == "type" else kind) for name, kind in structs.CLinear._fields_]


class Route(ctypes.Structure):
    """A wrong mirror: its last field is not there."""

    _fields_ = structs.CRoute._fields_[:-1]


@pytest.mark.parametrize(
    ("mirror", "said"),
    [
        (Norm, "the CPU kernels' Norm.rows is 8 bytes at 32, offmoe's 8 bytes at 40; install offmoe again"),
        (Linear, "the CPU kernels' Linear.type is 4 bytes at 52, offmoe's 2 bytes at 52; install offmoe again"),
        (Route, "the CPU kernels' Route"),
    ],
)
def test_a_struct_that_python_has_otherwise_refuses_the_library(
    monkeypatch: pytest.MonkeyPatch, mirror: type[ctypes.Structure], said: str
) -> None:
    others = [known for known in structs.MIRRORS if known.__name__ != f"C{mirror.__name__}"]
    monkeypatch.setattr(structs, "MIRRORS", (*others, mirror))
    kernels, note = load_cpu_kernels()
    assert kernels is None and note.startswith(said)
    with pytest.raises(UsageError, match="cannot be had: the CPU kernels' "):
        load_cpu_kernels("portable")


def test_every_struct_has_a_mirror_that_is_compared() -> None:
    mirrors = {
        kind.__name__.removeprefix("C")
        for kind in vars(structs).values()
        if isinstance(kind, type) and kind in structs.MIRRORS
    }
    declared = set(re.findall(r"^struct (\w+) \{", (Path(structs.__file__).parent / "src" / "abi.h").read_text(), re.M))
    assert mirrors == declared
