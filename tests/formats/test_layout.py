"""Device slots: every layer's sources at fixed, aligned places that do not overlap."""

from __future__ import annotations

from contextlib import closing

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from makers import WIDTH_D, WIDTH_F, TinyExperts, index_experts

from offmoe.checkpoint.expert_index import ExpertIndex, ExpertPart, MoeLayer, Span
from offmoe.checkpoint.index import CheckpointIndex
from offmoe.core.keys import ExpertKey
from offmoe.formats.dense import view_expert
from offmoe.formats.layout import SLOT_ALIGN_BYTES, device_slot_bytes, layout_of


def make_layer(sizes: list[int], order: list[int]) -> MoeLayer:
    parts = tuple(ExpertPart(source_idx=idx, offset=0, shape=(1, 1), strides=(1, 1), dtype="BF16") for idx in order)
    spans = tuple(
        tuple(Span(file_idx=0, start=1000 * expert + idx, num_bytes=size) for idx, size in enumerate(sizes))
        for expert in range(2)
    )
    return MoeLayer(
        name="experts", num_experts=2, top_k=1, up=parts[:-1], down=parts[-1:], transposed=False, spans=spans
    )


@given(
    sizes=st.lists(st.integers(1, 2000), min_size=2, max_size=4).flatmap(
        lambda sizes: st.tuples(st.just(sizes), st.permutations(range(len(sizes))))
    )
)
def test_sources_lie_apart_at_aligned_places(sizes: tuple[list[int], list[int]]) -> None:
    num_bytes, order = sizes
    layout = layout_of(make_layer(num_bytes, order))
    assert all(offset % SLOT_ALIGN_BYTES == 0 for offset in (*layout.offsets, layout.slot_bytes))
    taken = sorted((offset, offset + size) for offset, size in zip(layout.offsets, num_bytes, strict=True))
    assert all(first[1] <= second[0] for first, second in zip(taken, taken[1:], strict=False))
    assert taken[-1][1] <= layout.slot_bytes < taken[-1][1] + SLOT_ALIGN_BYTES
    assert [layout.offsets[idx] for idx in order] == sorted(layout.offsets)


def test_a_slot_fits_the_largest_layer() -> None:
    index = ExpertIndex((make_layer([300, 20], [0, 1]), make_layer([5000, 20], [0, 1])))
    assert [layout_of(layer).slot_bytes for layer in index.layers] == [768, 5376]
    assert device_slot_bytes(index) == 5376


def test_a_source_without_a_part_still_has_a_place() -> None:
    layout = layout_of(make_layer([100, 100, 100], [2, 0]))
    assert layout.offsets == (256, 512, 0)


def test_a_fused_source_is_placed_once() -> None:
    layout = layout_of(make_layer([512, 256], [0, 0, 1]))
    assert layout.offsets == (0, 512)
    assert layout.slot_bytes == 768


def test_gate_and_up_join_and_show_the_experts_bytes(tiny: TinyExperts) -> None:
    with closing(CheckpointIndex.open(tiny.folder)) as checkpoint:
        index = index_experts(checkpoint)
    layer, layout = index.layers[1], layout_of(index.layers[1])
    slot = torch.zeros(device_slot_bytes(index), dtype=torch.uint8)
    gate, up, down = tiny.matrices(ExpertKey(1, 5))
    for offset, matrix in zip(layout.offsets, (gate, up, down), strict=True):
        slot[offset : offset + matrix.nbytes] = matrix.contiguous().view(-1).view(torch.uint8)
    weights = view_expert(layer, slot, layout.offsets)
    assert [part.shape for part in weights.up] == [(2 * WIDTH_F, WIDTH_D)], "one matrix, so one product"
    assert torch.equal(weights.up[0], torch.cat([gate, up]))
    assert torch.equal(weights.down[0], down)


@pytest.mark.parametrize("num_bytes", [1, 256, 257])
def test_slots_are_whole_multiples(num_bytes: int) -> None:
    assert layout_of(make_layer([num_bytes, 1], [0, 1])).slot_bytes == -(-num_bytes // 256) * 256 + 256
