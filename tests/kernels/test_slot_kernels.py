"""Rows computed from a slab's slots by plain torch: bit for bit what the reference gives for the same weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import slot_cases as cases
import torch

from offmoe.formats.dense import ExpertWeights, view_expert
from offmoe.formats.layout import layout_of
from offmoe.kernels.activations import Activation, find_activation
from offmoe.kernels.make_slot_kernels import make_slot_kernels
from offmoe.kernels.reference import combine_rows, experts_forward, one_token_forward
from offmoe.kernels.slot_kernels import TorchSlotKernels
from offmoe.moe.backends import Computed, KernelBackend, ReferenceBackend
from offmoe.moe.dispatch import Assignment, dispatch

CPU = torch.device("cpu")


def make(layout: str = "published", dtype: torch.dtype = torch.bfloat16, *, biases: bool = True) -> cases.SlotCase:
    return cases.make_case(
        layout=layout, dtype=dtype, width_D=40, width_F=24, activate=cases.silu_gate, biases=biases, missing=(2,)
    )


def kernels_of(case: cases.SlotCase, missing_L: torch.Tensor | None = None) -> TorchSlotKernels:
    table_LE = case.slot_of_E[None]
    model = ([case.layer], [case.math], case.slab, case.slot_bytes)
    return TorchSlotKernels(*model, slot_of_LE=table_LE, missing_L=missing_L)


def weights_of(case: cases.SlotCase, expert: int) -> ExpertWeights:
    begin = int(case.slot_of_E[expert]) * case.slot_bytes
    return view_expert(case.layer, case.slab[begin : begin + case.slot_bytes], layout_of(case.layer).offsets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_one_token_is_the_reference(layout: str, dtype: torch.dtype) -> None:
    case = make(layout, dtype)
    x_1D, _, _ = case.rows(1, 2)
    experts = [4, 0, 5]
    expected = one_token_forward(case.math, [(expert, weights_of(case, expert)) for expert in experts], x_1D)
    expert_N = torch.tensor(experts)
    got = kernels_of(case).rows_forward(0, x_1D, torch.zeros(3, dtype=torch.int64), case.slot_of_E[expert_N], expert_N)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_rows_of_many_tokens_are_the_reference_in_any_order(layout: str) -> None:
    case = make(layout)
    x_TD, ids_TK, _ = case.rows(7, 3)
    expert_N = ids_TK.reshape(-1)
    token_N = torch.arange(21) // 3
    order_N = torch.randperm(21, generator=torch.Generator().manual_seed(1))
    got = kernels_of(case).rows_forward(0, x_TD, token_N[order_N], case.slot_of_E[expert_N][order_N], expert_N[order_N])
    for row, position in zip(got, order_N.tolist(), strict=True):
        expert = int(expert_N[position])
        x_1D = x_TD[position // 3][None]
        if expert == 2:
            assert not row.any(), "an expert without a slot gives nothing"
        else:
            assert torch.equal(row, experts_forward(case.math, [(expert, weights_of(case, expert), x_1D)])[0])


def test_in_one_path_a_row_is_normed_alone() -> None:
    """A norm that rounds by how many rows there are, as torch's sums on a GPU do."""
    case = make(biases=False)
    math = replace(case.math, post_norm=lambda y_ND: y_ND * (1 + len(y_ND)))
    kernels = TorchSlotKernels([case.layer], [math], case.slab, case.slot_bytes)
    x_1D, _, _ = case.rows(1, 2)
    experts = [
        Computed(int(case.slot_of_E[idx]), weights_of(case, idx), [Assignment(idx, 1, choice, None)])
        for choice, idx in enumerate((0, 4, 5))
    ]
    rows = KernelBackend(kernels, one_path=True)
    found = []
    for cut in (1, 2, 3):  # hits first, then arrivals
        y_SD = torch.zeros(3, 40, dtype=torch.bfloat16)
        for group in (experts[:cut], experts[cut:]):
            rows.compute(0, math, group, x_1D, y_SD)
        found.append(y_SD)
    expected = one_token_forward(case.math, [(idx, weights_of(case, idx)) for idx in (0, 4, 5)], x_1D) * 2
    assert all(torch.equal(y_SD, expected) for y_SD in found)


class Counted(TorchSlotKernels):
    """Kernels with tiles or without, that count the rows they are given."""

    tiles, num_rows = False, 0

    def has_tiles(self, layer_idx: int) -> bool:
        return self.tiles

    def rows_forward(self, layer_idx: int, x_TD: torch.Tensor, *indices: torch.Tensor) -> torch.Tensor:
        self.num_rows += indices[0].numel()
        return super().rows_forward(layer_idx, x_TD, *indices)


@pytest.mark.parametrize(
    ("num_tokens", "tiles", "served"),
    [(16, False, True), (17, False, False), (17, True, True), (64, True, True), (600, True, False)],
)
def test_tiles_serve_prompts_until_large_products_are_faster(num_tokens: int, tiles: bool, served: bool) -> None:
    """Three experts of six: 600 tokens choose each some 200 times."""
    case = make(dtype=torch.float32)
    kernels = Counted([case.layer], [case.math], case.slab, case.slot_bytes)
    kernels.tiles = tiles
    x_TD, _, _ = case.rows(num_tokens, 2)
    ids_TK = torch.tensor([0, 4, 5])[torch.randint(3, (num_tokens, 1), generator=torch.Generator().manual_seed(1))]
    experts = [
        Computed(int(case.slot_of_E[one.expert_idx]), weights_of(case, one.expert_idx), [one])
        for one in dispatch(ids_TK, 6)
    ]
    y_SD, expected_SD = torch.zeros(num_tokens, 40), torch.zeros(num_tokens, 40)
    KernelBackend(kernels).compute(0, case.math, experts, x_TD, y_SD)
    ReferenceBackend().compute(0, case.math, experts, x_TD, expected_SD)
    assert kernels.num_rows == (num_tokens if served else 0)
    torch.testing.assert_close(y_SD, expected_SD)


def test_tokens_are_the_weighted_sum_of_their_rows_and_look_up_finds_the_same() -> None:
    case, missing_L = make(), torch.zeros(1, dtype=torch.int32)
    kernels = kernels_of(case, missing_L)
    x_TD, ids_TK, weights_TK = case.rows(5, 3)
    ids_TK[3, 1] = 6  # padding
    slot_TK = torch.where(ids_TK < 6, case.slot_of_E[ids_TK.clamp(max=5)], -1)
    y_ND = kernels.rows_forward(0, x_TD, torch.arange(15) // 3, slot_TK.reshape(-1), ids_TK.reshape(-1))
    expected = (y_ND.view(5, 3, -1) * weights_TK[:, :, None]).sum(dim=1).to(x_TD.dtype)
    assert torch.equal(kernels.tokens_forward(0, x_TD, ids_TK, slot_TK, weights_TK), expected)
    assert torch.equal(kernels.lookup_forward(0, x_TD, ids_TK, weights_TK), expected)
    assert int(missing_L) == int((ids_TK == 2).sum()) > 0


def test_no_rows() -> None:
    case = make()
    none = torch.zeros(0, dtype=torch.int64)
    x_TD, _, _ = case.rows(2, 1)
    assert kernels_of(case).rows_forward(0, x_TD, none, none, none).shape == (0, 40)


def test_a_token_whose_experts_are_all_missing() -> None:
    case = make()
    x_1D, _, _ = case.rows(1, 1)
    ids_1K = torch.tensor([[2]])
    got = kernels_of(case).tokens_forward(0, x_1D, ids_1K, torch.tensor([[-1]]), torch.ones(1, 1))
    assert not got.any()


def test_a_slot_that_another_layer_used_is_seen_with_its_own_layout() -> None:
    first, second = make("published"), make("transposed")
    kernels = TorchSlotKernels(
        [first.layer, second.layer], [first.math, second.math], first.slab, first.slot_bytes
    )  # fmt: skip
    x_1D, ids_1K, weights_1K = first.rows(1, 2)
    tokens = (x_1D, ids_1K, first.slot_of_E[ids_1K], weights_1K)
    before = kernels.tokens_forward(0, *tokens)
    slot = int(first.slot_of_E[ids_1K[0, 0]])
    kernels.tokens_forward(1, *tokens)
    assert torch.equal(kernels.tokens_forward(0, *tokens), before)
    first.slab[slot * first.slot_bytes : (slot + 1) * first.slot_bytes].zero_()
    assert not torch.equal(kernels.tokens_forward(0, *tokens), before), "views, not copies"


def test_a_cpu_slab_is_computed_by_torch_with_a_reason() -> None:
    case = make()
    kernels = make_slot_kernels([case.layer] * 2, [case.math] * 2, case.slab, case.slot_bytes)
    assert isinstance(kernels, TorchSlotKernels)
    assert kernels.reasons == dict.fromkeys((0, 1), "computed by torch on cpu")


def test_combine_sums_in_the_routers_order() -> None:
    y_ND = torch.arange(12, dtype=torch.float32).view(4, 3)
    weights_TK = torch.tensor([[1.0, 2.0], [0.5, 0.0]])
    expected = torch.stack([y_ND[0] + 2 * y_ND[1], 0.5 * y_ND[2]])
    assert torch.equal(combine_rows(y_ND, weights_TK, torch.float32), expected)


CLAMPED = Activation(kind="silu", gated=True, gate_limit=1.5, up_limit=1.5)


@pytest.mark.parametrize(
    ("activate", "expected"),
    [
        (cases.silu_gate, Activation(kind="silu", gated=True)),
        (cases.gelu_gate, Activation(kind="gelu", gated=True)),
        (cases.gelu_tanh_gate, Activation(kind="gelu_tanh", gated=True)),
        (cases.clamped_gate, replace(CLAMPED, interleaved=True, alpha=1.702, offset=1.0)),
        (cases.early_clamp_gate, CLAMPED),
        (cases.late_clamp_gate, replace(CLAMPED, gate_limit=1.758464)),  # where silu is 1.5
        (cases.unknown_gate, None),
    ],
)
def test_a_gate_is_known_by_its_numbers(
    activate: Callable[[torch.Tensor], torch.Tensor], expected: Activation | None
) -> None:
    assert find_activation(activate, 24, gated=True, device=CPU) == expected


@pytest.mark.parametrize(
    ("activate", "kind"),
    [
        (cases.relu_squared, "relu_squared"),
        (torch.nn.functional.gelu, "gelu"),
        (torch.relu, "relu"),
        (torch.tanh, None),
    ],
)
def test_an_activation_without_a_gate(activate: Callable[[torch.Tensor], torch.Tensor], kind: str | None) -> None:
    found = find_activation(activate, 24, gated=False, device=CPU)
    assert (None if found is None else found.kind) == kind


def test_an_activation_that_mixes_channels_is_unknown() -> None:
    def mixes(up: torch.Tensor) -> torch.Tensor:
        return cases.silu_gate(up).roll(1, dims=-1)

    assert find_activation(mixes, 24, gated=True, device=CPU) is None


def test_an_activation_that_takes_one_type_only_is_unknown() -> None:
    def picky(up: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(up, torch.eye(48, dtype=torch.bfloat16))

    assert find_activation(picky, 24, gated=True, device=CPU) is None


@pytest.mark.parametrize(("capability", "refused"), [((7, 5), True), ((8, 0), False), ((12, 0), False), (None, False)])
def test_bfloat16_on_a_device_without_it_is_left_to_torch_by_name(
    capability: tuple[int, int] | None, refused: bool
) -> None:
    pytest.importorskip("triton", reason="triton has no wheel for this platform")
    from offmoe.kernels.triton.slots import _obstacle

    case = make(dtype=torch.bfloat16)
    reason = _obstacle(case.layer, case.math, capability)
    assert (reason is not None) == refused
    assert not refused or "7.5" in str(reason)
    half = make(dtype=torch.float16)
    assert _obstacle(half.layer, half.math, capability) is None
