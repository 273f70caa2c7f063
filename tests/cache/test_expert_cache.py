"""The cache over real files: whatever was evicted, failed or abandoned before, a key's weights are the file's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from makers import (
    NUM_EXPERTS,
    NUM_LAYERS,
    Opened,
    RecordingDisk,
    TinyExperts,
    failing_reads,
    make_tiny_experts,
    open_cache,
)

from offmoe.cache import backing_store as sources
from offmoe.cache.expert_cache import ExpertCache
from offmoe.checkpoint.expert_index import ReadPlan
from offmoe.core.errors import BudgetError, CheckpointError, DiskReadError
from offmoe.core.keys import ExpertKey
from offmoe.formats.dense import ExpertWeights, torch_dtype
from offmoe.tiers.copier import Ticket
from offmoe.tiers.host import HostPool

KEYS = [ExpertKey(layer, expert) for layer in range(NUM_LAYERS) for expert in range(NUM_EXPERTS)]
A, B, C, D, E = KEYS[:5]


def fetch(cache: ExpertCache, key: ExpertKey, *, cold: bool = False) -> ExpertWeights:
    started = cache.start(key, cold=cold)
    assert started is not None
    return cache.finish(started)


def load(cache: ExpertCache, *keys: ExpertKey, cold: bool = False) -> None:
    """Fetch and let go."""
    for key in keys:
        fetch(cache, key, cold=cold)
        cache.release([key])


def assert_weights(weights: ExpertWeights, tiny: TinyExperts, key: ExpertKey) -> None:
    gate, up, down = tiny.matrices(key)
    assert torch.equal(torch.cat(weights.up), torch.cat([gate, up]))
    assert torch.equal(torch.cat(weights.down, dim=1), down)


@pytest.fixture
def opened(tiny: TinyExperts) -> Iterator[Opened]:
    with open_cache(tiny, num_slots=3) as made:
        yield made
        made.assert_at_rest()


@pytest.mark.parametrize("io", ["auto", "buffered"])
def test_every_expert_is_what_the_file_holds(tiny_of_layout: TinyExperts, io: str) -> None:
    with open_cache(tiny_of_layout, num_slots=len(KEYS), io=io) as opened:
        for key in KEYS:
            assert_weights(fetch(opened.cache, key), tiny_of_layout, key)
        for key in KEYS:  # all at once: no slot runs into the next
            assert_weights(opened.cache.use(key, touch=True), tiny_of_layout, key)


def test_matrices_side_by_side_are_one_matrix_without_a_copy(tiny: TinyExperts) -> None:
    with open_cache(tiny, num_slots=1, io="buffered") as opened:
        weights = fetch(opened.cache, A)
        assert len(weights.up) == len(weights.down) == 1
        slot = opened.pool.tensor(0)
        for matrix in (*weights.up, *weights.down):
            assert slot.data_ptr() <= matrix.data_ptr() < slot.data_ptr() + slot.nbytes


@settings(max_examples=50)
@given(
    num_slots=st.integers(1, 6),
    io=st.sampled_from(["auto", "buffered"]),
    steps=st.lists(st.tuples(st.sampled_from(KEYS), st.booleans(), st.booleans()), max_size=40),
)
def test_random_access_with_few_slots(
    tiny: TinyExperts, num_slots: int, io: str, steps: list[tuple[ExpertKey, bool, bool]]
) -> None:
    with open_cache(tiny, num_slots=num_slots, io=io) as opened:
        cache = opened.cache
        for key, cold, touch in steps:
            weights = cache.use(key, touch=touch) if cache.is_ready(key) else fetch(cache, key, cold=cold)
            assert_weights(weights, tiny, key)
            cache.slots.check_integrity()
            cache.release([key])
            assert cache.is_ready(key)
            assert len(opened.cached()) <= num_slots
        opened.assert_at_rest()
        assert cache.counters.evictions == max(0, len(opened.disk.plans_read) - num_slots)


def test_the_least_recently_used_is_evicted(opened: Opened) -> None:
    load(opened.cache, A, B, C)
    opened.cache.use(A, touch=True)
    opened.cache.release([A])
    load(opened.cache, D)
    assert opened.cached() == {A, C, D}
    assert opened.cache.counters.evictions == 1


def test_a_use_without_touch_does_not_save_a_key(opened: Opened) -> None:
    load(opened.cache, A, B, C)
    opened.cache.use(A, touch=False)
    opened.cache.release([A])
    load(opened.cache, D)
    assert opened.cached() == {B, C, D}


def test_a_cold_key_makes_room_first(opened: Opened) -> None:
    load(opened.cache, A, B)
    load(opened.cache, C, cold=True)
    load(opened.cache, D)
    assert opened.cached() == {A, B, D}


def test_held_keys_stay_and_nothing_starts_without_a_slot(opened: Opened) -> None:
    cache = opened.cache
    weights = {key: fetch(cache, key) for key in (A, B)}
    filling = cache.start(C, cold=False)
    assert filling is not None
    assert cache.start(D, cold=False) is None
    assert not cache.is_ready(C)
    weights[C] = cache.finish(filling)
    assert cache.start(D, cold=False) is None
    cache.release([B])
    load(cache, D)
    assert opened.cached() == {A, C, D}
    for key in (A, C):
        assert_weights(weights[key], opened.tiny, key)
        cache.release([key])


def test_holds_are_counted(opened: Opened) -> None:
    fetch(opened.cache, A)
    opened.cache.use(A, touch=True)
    opened.cache.release([A])
    load(opened.cache, B, C, D)
    assert opened.cache.is_ready(A)
    opened.cache.release([A])
    load(opened.cache, E, B)
    assert not opened.cache.is_ready(A)


def test_state_is_visible(opened: Opened) -> None:
    load(opened.cache, A)
    opened.cache.counters.hits, opened.cache.counters.misses = 12, 4
    fetch(opened.cache, B)
    filling = opened.cache.start(C, cold=False)
    assert filling is not None
    assert repr(opened.cache) == "<ExpertCache [slots: 2 ready, 1 filling, 0 free | 1 held | 12 hits, 4 misses]>"
    opened.cache.abandon([filling])
    opened.cache.release([B])
    assert (opened.cache.num_slots, opened.cache.slots_per_layer) == (3, 1)


def test_a_failed_read_frees_the_slot_and_leaves_the_others(opened: Opened) -> None:
    load(opened.cache, A, B)
    with failing_reads(opened, C), pytest.raises(DiskReadError, match="check the drive"):
        fetch(opened.cache, C)
    opened.assert_at_rest()
    assert opened.cached() == {A, B}
    assert_weights(fetch(opened.cache, C), opened.tiny, C)
    opened.cache.release([C])
    assert opened.cached() == {A, B, C}


def test_failing_forever_uses_up_nothing(opened: Opened) -> None:
    load(opened.cache, A)
    with failing_reads(opened, B):
        for _ in range(10):
            with pytest.raises(DiskReadError):
                fetch(opened.cache, B)
    load(opened.cache, C, D)
    assert opened.cached() == {A, C, D}


def test_abandoned_reads_free_their_slots(opened: Opened) -> None:
    with failing_reads(opened, B):
        fetches = [opened.cache.start(key, cold=False) for key in (A, B, C)]
        opened.cache.abandon(f for f in fetches if f is not None)
    opened.assert_at_rest()
    assert opened.cached() == set()
    for key in (A, B, C):
        assert_weights(fetch(opened.cache, key), opened.tiny, key)
        opened.cache.release([key])


class InterruptedTicket:
    """A read during which the user presses Ctrl-C, some times over."""

    def __init__(self, inner: Ticket, presses: int) -> None:
        self.inner, self.presses = inner, presses

    def done(self) -> bool:
        return not self.presses and self.inner.done()

    def wait(self) -> None:
        if self.presses:
            self.presses -= 1
            raise KeyboardInterrupt
        self.inner.wait()


@pytest.mark.parametrize("presses", [1, 3])
def test_an_interrupted_wait_ends_the_read_and_frees_the_slot(
    opened: Opened, monkeypatch: pytest.MonkeyPatch, presses: int
) -> None:
    read = opened.disk.read
    monkeypatch.setattr(
        opened.disk, "read", lambda plan, slot, **options: InterruptedTicket(read(plan, slot, **options), presses)
    )
    fetches = [opened.cache.start(key, cold=False) for key in (A, B)]
    assert fetches[0] is not None
    with pytest.raises(KeyboardInterrupt):
        opened.cache.finish(fetches[0])
    with pytest.raises(KeyboardInterrupt):
        opened.cache.abandon(f for f in fetches[1:] if f is not None)
    opened.assert_at_rest()
    assert opened.cached() == set()
    monkeypatch.undo()
    load(opened.cache, A, B)


def test_bytes_that_cannot_be_viewed_free_the_slot(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> ExpertWeights:
        raise CheckpointError("stored as I8")

    monkeypatch.setattr(sources, "view_expert", refuse)
    with pytest.raises(CheckpointError):
        fetch(opened.cache, A)
    opened.assert_at_rest()
    assert opened.cached() == set()
    monkeypatch.undo()
    load(opened.cache, A)


def test_a_file_that_changes_is_an_error_for_new_reads_only(tmp_path: Path) -> None:
    tiny = make_tiny_experts(tmp_path)
    with open_cache(tiny, num_slots=3) as opened:
        load(opened.cache, A)
        (tmp_path / "model.safetensors").unlink()
        with pytest.raises(CheckpointError, match="was replaced or removed"):
            fetch(opened.cache, B)
        assert_weights(opened.cache.use(A, touch=True), tiny, A)
        opened.cache.release([A])
        opened.assert_at_rest()


def test_reads_are_of_one_expert_each(opened: Opened) -> None:
    load(opened.cache, A, B, C)
    expected = sum(span.num_bytes for key in (A, B, C) for span in opened.experts.spans(key))
    assert expected <= opened.cache.counters.disk_bytes < expected + 3 * 2 * opened.disk.align_bytes
    assert len(opened.disk.plans_read) == 3


def arrive(cache: ExpertCache) -> None:
    """Until nothing that was fetched ahead is under way."""
    while cache.ahead_bytes:
        cache.poll()


def test_a_guess_is_kept_until_its_layer_has_run_and_then_goes_first(opened: Opened) -> None:
    cache = opened.cache
    load(cache, A, B)
    assert cache.start_ahead(C, keep=())
    arrive(cache)
    load(cache, D)  # A goes, the oldest
    assert opened.cached() == {B, C, D}
    cache.expire_ahead(C.layer_idx, needed=[D])
    assert cache.counters.ahead_wasted_bytes == cache.num_bytes(C)
    load(cache, E)
    assert opened.cached() == {B, D, E}


def test_an_expert_that_is_served_elsewhere_is_admitted_when_it_is_used_far_more_often(opened: Opened) -> None:
    """Until then its uses are counted. It is no guess: its layer may run without it, and it waits for a later use."""
    cache, counts = opened.cache, opened.cache.policy.usage.counts
    load(cache, A, B, D)  # three slots, each used once
    assert not cache.admit(C) and not cache.admit(C) and counts[C] == 2
    assert cache.admit(C) and not cache.admit(E)  # A goes, the oldest; one such copy at a time
    arrive(cache)
    assert opened.cached() == {B, C, D} and counts[C] == 3
    cache.expire_ahead(C.layer_idx, needed=[A])
    assert cache.counters.ahead_wasted_bytes == 0
    cache.use(C, touch=True)
    cache.release([C])
    assert cache.counters.ahead_used_bytes == cache.num_bytes(C)


def test_what_is_served_elsewhere_takes_free_slots_at_once(opened: Opened) -> None:
    assert opened.cache.admit(C)
    arrive(opened.cache)
    assert opened.cached() == {C} and opened.cache.counters.evictions == 0


class FilledDisk(RecordingDisk):
    """Overwrites the slot before it reads, as an evicted expert's bytes do."""

    def read(self, plan: ReadPlan, slot: memoryview, *, urgent: bool = True) -> Ticket:
        slot[:] = b"\xff" * len(slot)
        return super().read(plan, slot, urgent=urgent)


def test_no_byte_of_the_evicted_expert_is_left(tiny_of_layout: TinyExperts) -> None:
    with open_cache(tiny_of_layout, num_slots=1, disk_type=FilledDisk) as opened:
        for key in KEYS:
            assert_weights(fetch(opened.cache, key), tiny_of_layout, key)
            opened.cache.release([key])


def test_slots_of_the_pool_do_not_overlap() -> None:
    pool = HostPool(num_slots=3, slot_bytes=4096)
    for slot in range(3):
        pool.memory(slot)[:] = bytes([slot + 1]) * 4096
    assert [pool.tensor(slot).unique().tolist() for slot in range(3)] == [[1], [2], [3]]
    assert {pool.tensor(slot).data_ptr() % 4096 for slot in range(3)} == {0}
    pool.close()
    with pytest.raises(AssertionError, match="closed"):
        pool.tensor(0)


def test_a_pool_that_the_system_refuses() -> None:
    with pytest.raises(BudgetError, match="lower --ram"):
        HostPool(num_slots=1 << 20, slot_bytes=1 << 44)


def test_quantised_experts_are_not_dense() -> None:
    with pytest.raises(CheckpointError, match="layer 3 is stored as I8; dense experts are read as F32, BF16"):
        torch_dtype("I8", where="layer 3")
