"""Read plans: every byte of every source arrives where the plan says, in as few reads as the files allow."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from makers import NUM_EXPERTS, NUM_LAYERS, TOP_K, TinyExperts, index_experts, make_tiny_experts

from offmoe.checkpoint.expert_index import BUFFERED_ALIGN_BYTES, ReadPlan, Run, Span, plan_read
from offmoe.checkpoint.index import CheckpointIndex
from offmoe.checkpoint.shard_file import DIRECT_ALIGN_BYTES
from offmoe.core.keys import ExpertKey

FILE_BYTES = 3 * DIRECT_ALIGN_BYTES + 77
FILES = [random.Random(seed).randbytes(FILE_BYTES) for seed in range(3)]


def span(start: int, num_bytes: int, file_idx: int = 0) -> Span:
    return Span(file_idx=file_idx, start=start, num_bytes=num_bytes)


def carry_out(plan: ReadPlan) -> bytes:
    """The slot after the plan's reads; bytes behind the end of a file do not arrive, and must not be needed."""
    slot = bytearray(plan.slot_bytes)
    for run in plan.runs:
        arrived = FILES[run.file_idx][run.start : run.start + run.num_bytes]
        assert len(arrived) >= run.need_bytes
        slot[run.slot_offset : run.slot_offset + len(arrived)] = arrived
    return bytes(slot)


spans_of_an_expert = st.lists(
    st.builds(
        lambda file_idx, start, num_bytes: span(start, min(num_bytes, FILE_BYTES - start), file_idx),
        st.integers(0, len(FILES) - 1),
        st.integers(0, FILE_BYTES) | st.sampled_from([0, 4096, 8192]),
        st.integers(0, 5000) | st.sampled_from([4096, FILE_BYTES]),
    ),
    min_size=1,
    max_size=6,
).map(tuple)
# Neighbours, in any order: what published checkpoints look like.
neighbours = st.builds(
    lambda start, sizes, order: tuple(
        order.sample([span(start + sum(sizes[:i]), size) for i, size in enumerate(sizes)], len(sizes))
    ),
    st.integers(0, 5000),
    st.lists(st.integers(1, 2000), min_size=1, max_size=3),
    st.randoms(use_true_random=False),
)


@given(
    spans=spans_of_an_expert | neighbours, align_bytes=st.sampled_from([1, BUFFERED_ALIGN_BYTES, DIRECT_ALIGN_BYTES])
)
def test_every_source_arrives_where_the_plan_says(spans: tuple[Span, ...], align_bytes: int) -> None:
    plan = plan_read(spans, align_bytes=align_bytes)
    slot = carry_out(plan)
    for source, offset in zip(spans, plan.source_offsets, strict=True):
        expected = FILES[source.file_idx][source.start : source.start + source.num_bytes]
        assert slot[offset : offset + source.num_bytes] == expected
    check_runs(plan, align_bytes)


def check_runs(plan: ReadPlan, align_bytes: int) -> None:
    """Aligned in file and memory, inside the slot, and apart from each other."""
    end = 0
    for run in plan.runs:
        assert run.start % align_bytes == run.num_bytes % align_bytes == run.slot_offset % align_bytes == 0
        assert end <= run.slot_offset and run.need_bytes <= run.num_bytes < run.need_bytes + align_bytes
        end = run.slot_offset + run.num_bytes
    assert end == plan.slot_bytes


@given(spans=neighbours, align_bytes=st.sampled_from([1, DIRECT_ALIGN_BYTES]))
def test_neighbours_are_one_read(spans: tuple[Span, ...], align_bytes: int) -> None:
    assert len(plan_read(spans, align_bytes=align_bytes).runs) == 1


def test_a_gap_is_not_read() -> None:
    plan = plan_read((span(100, 10), span(111, 10)), align_bytes=1)
    assert plan == ReadPlan(
        runs=(
            Run(file_idx=0, start=100, num_bytes=10, slot_offset=0, need_bytes=10),
            Run(file_idx=0, start=111, num_bytes=10, slot_offset=10, need_bytes=10),
        ),
        source_offsets=(0, 10),
        slot_bytes=20,
    )


def test_aligned_reads_are_widened_to_blocks() -> None:
    plan = plan_read((span(5000, 4000), span(100, 50)), align_bytes=4096)
    assert plan == ReadPlan(
        runs=(
            Run(file_idx=0, start=0, num_bytes=4096, slot_offset=0, need_bytes=150),
            Run(file_idx=0, start=4096, num_bytes=8192, slot_offset=4096, need_bytes=4904),
        ),
        source_offsets=(5000, 100),
        slot_bytes=12288,
    )


def test_neighbours_in_two_files_are_two_reads() -> None:
    plan = plan_read((span(0, 100), span(100, 100, file_idx=1)), align_bytes=1)
    assert [(run.file_idx, run.start, run.num_bytes) for run in plan.runs] == [(0, 0, 100), (1, 100, 100)]


def test_index_of_a_checkpoint(tiny_of_layout: TinyExperts) -> None:
    checkpoint = CheckpointIndex.open(tiny_of_layout.folder)
    checkpoint.close()
    index = index_experts(checkpoint)
    keys = list(index.keys())
    assert keys == [ExpertKey(layer, e) for layer in range(NUM_LAYERS) for e in range(NUM_EXPERTS)]
    assert (index.num_experts, index.num_bytes, index.top_k) == (len(keys), checkpoint.num_bytes, TOP_K)
    assert index.layers[0].expert_bytes * len(keys) == checkpoint.num_bytes
    for direct, align_bytes in ((False, BUFFERED_ALIGN_BYTES), (True, DIRECT_ALIGN_BYTES)):
        slot_bytes = index.slot_bytes(direct=direct)
        assert slot_bytes % DIRECT_ALIGN_BYTES == 0
        needed = [plan_read(index.spans(key), align_bytes=align_bytes).slot_bytes for key in keys]
        assert max(needed) <= slot_bytes < max(needed) + DIRECT_ALIGN_BYTES


@pytest.mark.parametrize(("layout", "num_runs"), [("adjacent", 1), ("odd header", 1), ("two shards", 2)])
def test_an_expert_is_as_few_reads_as_it_has_places(
    layout: str, num_runs: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tiny = make_tiny_experts(tmp_path_factory.mktemp("tiny"), layout=layout)
    checkpoint = CheckpointIndex.open(tiny.folder)
    checkpoint.close()
    index = index_experts(checkpoint)
    assert {len(plan_read(index.spans(key), align_bytes=1).runs) for key in index.keys()} == {num_runs}  # noqa: SIM118


@given(spans=spans_of_an_expert)
def test_buffered_and_direct_reads_lay_a_source_at_like_addresses(spans: tuple[Span, ...]) -> None:
    """The last bits of a float32 product depend on the address: both ways of reading must give the same."""
    buffered, direct = (plan_read(spans, align_bytes=align) for align in (BUFFERED_ALIGN_BYTES, DIRECT_ALIGN_BYTES))
    for source, one, other in zip(spans, buffered.source_offsets, direct.source_offsets, strict=True):
        assert one % 64 == other % 64 == source.start % 64
