"""The Triton kernels on a device against plain torch there: the interpreter's cases, larger.

And what only a device can show: that the host never waits, and that look-up can be captured in a graph.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import quant_cases
import slot_cases as cases
import torch

from offmoe.kernels.make_slot_kernels import make_slot_kernels
from offmoe.kernels.slot_kernels import SlotKernels, TorchSlotKernels

pytest.importorskip("triton")

# Relative to the largest output: a few roundings of a hidden value.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.02, torch.float16: 0.003}
Activate = Callable[[torch.Tensor], torch.Tensor]


def make(layout: str, dtype: torch.dtype, *, activate: Activate = cases.silu_gate, gated: bool = True,
         width_D: int = 512, width_F: int = 384, num_experts: int = 24) -> cases.SlotCase:  # fmt: skip
    return cases.make_case(
        layout=layout, dtype=dtype, width_D=width_D, width_F=width_F, activate=activate, gated=gated, biases=True,
        num_experts=num_experts, missing=(2, 7), top_k=4, device="cuda",
    )  # fmt: skip


def both(case: cases.SlotCase) -> tuple[SlotKernels, SlotKernels, torch.Tensor]:
    missing_L = torch.zeros(1, dtype=torch.int32, device="cuda")
    keep = case.slab.clone()
    model = ([case.layer], [case.math], case.slab, case.slot_bytes)
    fast = make_slot_kernels(*model, slot_of_LE=case.slot_of_E[None], missing_L=missing_L)
    assert fast.reasons == {}, "the check at load failed"
    case.slab.copy_(keep)
    return fast, TorchSlotKernels(*model), missing_L


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.synchronize()
    with warnings.catch_warnings():  # it says that it is a prototype
        warnings.simplefilter("ignore", UserWarning)
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def assert_close(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == expected.dtype
    scale = float(expected.abs().max())
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCES[dtype] * scale)


def compare(case: cases.SlotCase, tokens: tuple[int, ...] = (1, 3, 20, 300)) -> None:
    fast, slow, missing_L = both(case)
    for num_tokens in tokens:
        x_TD, ids_TK, weights_TK = case.rows(num_tokens, 4)
        slot_TK = case.slot_of_E[ids_TK]
        rows = (torch.arange(ids_TK.numel()) // 4, slot_TK.reshape(-1).cpu(), ids_TK.reshape(-1).cpu())
        missing_L.zero_()
        with no_waiting():
            y_ND = fast.rows_forward(0, x_TD, *rows)
            summed = fast.tokens_forward(0, x_TD, ids_TK, slot_TK, weights_TK)
            looked_up = fast.lookup_forward(0, x_TD, ids_TK, weights_TK)
        assert_close(y_ND, slow.rows_forward(0, x_TD, *rows), case.math.dtype)
        expected = slow.tokens_forward(0, x_TD, ids_TK, slot_TK, weights_TK)
        assert_close(summed, expected, case.math.dtype)
        assert_close(looked_up, expected, case.math.dtype)
        assert int(missing_L) == int((slot_TK < 0).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_every_layout(layout: str, dtype: torch.dtype) -> None:
    compare(make(layout, dtype))


@pytest.mark.parametrize(
    "activate", [cases.gelu_gate, cases.gelu_tanh_gate, cases.clamped_gate, cases.late_clamp_gate, cases.unknown_gate]
)
def test_every_activation(activate: Activate) -> None:
    compare(make("transposed" if activate is cases.clamped_gate else "published", torch.bfloat16, activate=activate))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", quant_cases.FORMATS)
def test_every_quantised_format(name: str, dtype: torch.dtype) -> None:
    compare(
        quant_cases.make_quantised(
            name, width_D=512, width_F=384, dtype=dtype, biases=True, num_experts=24, missing=(2, 7), top_k=4,
            device="cuda",
        )
    )  # fmt: skip


@pytest.mark.parametrize("name", [*quant_cases.SMALL_BLOCKS, *quant_cases.LARGE_BLOCKS])
def test_every_kind_of_gguf_block(name: str) -> None:
    compare(
        quant_cases.make_quantised(
            name, width_D=512, width_F=256 if name in quant_cases.LARGE_BLOCKS else 352, dtype=torch.bfloat16,
            biases=True, num_experts=24, missing=(2, 7), top_k=4, device="cuda",
        )
    )  # fmt: skip


def test_quantised_gate_and_up_in_one_matrix() -> None:
    options = {"dtype": torch.bfloat16, "num_experts": 24, "top_k": 4, "device": "cuda", "stacked": True}
    turns = {"transposed": True, "activate": cases.clamped_gate, "biases": True}
    compare(quant_cases.make_quantised("mxfp4", width_D=288, width_F=96, **options, **turns))
    compare(quant_cases.make_quantised("fp8", width_D=260, width_F=132, **options))


def test_experts_without_a_gate() -> None:
    compare(make("stacked", torch.bfloat16, activate=cases.relu_squared, gated=False))


@pytest.mark.parametrize(("width_D", "width_F"), [(2880, 2880), (100, 36), (70, 67)])
def test_widths_that_are_no_multiple_of_a_block(width_D: int, width_F: int) -> None:
    for layout in ("published", "transposed"):
        compare(make(layout, torch.bfloat16, width_D=width_D, width_F=width_F, num_experts=9), (1, 20))


def test_look_up_in_a_graph_sees_the_table_of_the_day() -> None:
    case = make("published", torch.bfloat16)
    fast, slow, missing_L = both(case)
    x_TD, ids_TK, weights_TK = case.rows(1, 4)
    ids_TK.copy_(torch.tensor([[0, 1, 3, 4]]))
    for _ in range(2):
        fast.lookup_forward(0, x_TD, ids_TK, weights_TK)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may call CUDA meanwhile
        y_TD = fast.lookup_forward(0, x_TD, ids_TK, weights_TK)
    missing_L.zero_()
    graph.replay()
    expected = slow.tokens_forward(0, x_TD, ids_TK, case.slot_of_E[ids_TK], weights_TK)
    assert_close(y_TD, expected, torch.bfloat16)
    assert int(missing_L) == 0
    case.slot_of_E[3] = -1  # evicted
    graph.replay()
    expected = slow.tokens_forward(0, x_TD, ids_TK, case.slot_of_E[ids_TK], weights_TK)
    assert_close(y_TD, expected, torch.bfloat16)
    assert int(missing_L) == 1


def test_a_norm_after_the_experts_makes_nothing_of_missing_rows() -> None:
    case = make("published", torch.bfloat16)
    norm = replace(case.math, post_norm=lambda y_ND: torch.nn.functional.layer_norm(y_ND, (512,)) + 1.0)
    compare(replace(case, math=norm), (1, 20))


def test_equal_calls_give_equal_bits() -> None:
    case = make("published", torch.bfloat16)
    fast, _, _ = both(case)
    for num_tokens in (1, 20, 300):
        x_TD, ids_TK, weights_TK = case.rows(num_tokens, 4)
        tokens = (0, x_TD, ids_TK, case.slot_of_E[ids_TK], weights_TK)
        assert torch.equal(fast.tokens_forward(*tokens), fast.tokens_forward(*tokens))
