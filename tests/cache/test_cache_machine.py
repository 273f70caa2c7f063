"""Slots, fetches ahead of time, cancellation and eviction, driven in any order hypothesis can think of.

Bytes arrive when the machine says so, or when they are waited for; until then a slot holds NaN. One tier (disk to RAM)
and two (RAM to a device) are driven by the same rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any, cast

import torch
from executor_cases import Call
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from makers import NUM_EXPERTS, NUM_LAYERS, RecordingDisk, TinyExperts, make_tiny_experts, open_cache
from two_tiers import open_two_tiers

from offmoe.cache.expert_cache import ExpertCache
from offmoe.checkpoint.expert_index import ReadPlan
from offmoe.core.errors import DiskReadError
from offmoe.core.keys import ExpertKey
from offmoe.moe.cpu_experts import CpuExperts
from offmoe.moe.executor import Executor
from offmoe.prefetch.ahead import PrefetchCoordinator
from offmoe.prefetch.controller import PrefetchController
from offmoe.tiers.copier import CancelledMoveError, Ticket

if TYPE_CHECKING:
    from offmoe.prefetch.lookahead import Lookahead

KEYS = [ExpertKey(layer, expert) for layer in range(NUM_LAYERS) for expert in range(NUM_EXPERTS)]
POISON = 0xFF
BUDGET_BYTES = 100_000


class ManualMove:
    """A move that ends when `arrive` says so, or when it is waited for. Writes to nothing once it was taken back."""

    def __init__(self, carry: object, fails: bool) -> None:
        self._carry, self._fails = carry, fails
        self.urgent = False
        self._ended = self._cancelled = False

    def arrive(self) -> None:
        if not self._ended:
            self._ended = True
            if not self._fails and not self._cancelled:
                self._carry()  # type: ignore[operator]

    def done(self) -> bool:
        return self._ended

    def wait(self) -> None:
        self.arrive()
        if self._cancelled:
            raise CancelledMoveError("taken back")
        if self._fails:
            raise DiskReadError("the drive failed; check the drive")

    def cancel(self) -> bool:
        if self._ended or self._cancelled:
            return False
        self._cancelled = True
        return True

    def promote(self) -> None:
        self.urgent = True


class Moves:
    """All moves of a machine, in the order in which they were begun."""

    def __init__(self) -> None:
        self.under_way: list[ManualMove] = []
        self.fail_next = False

    def add(self, carry: object) -> ManualMove:
        move = ManualMove(carry, self.fail_next)
        self.fail_next = False
        self.under_way = [other for other in self.under_way if not other.done()] + [move]
        return move

    def end_all(self) -> None:
        for move in self.under_way:
            move.arrive()


class ManualDisk(RecordingDisk):
    """Reads end by hand."""

    moves: Moves

    def read(self, plan: ReadPlan, slot: memoryview, *, urgent: bool = True) -> Ticket:
        slot[:] = bytes([POISON]) * len(slot)
        return self.moves.add(lambda: super(ManualDisk, self).read(plan, slot, urgent=urgent).wait())

    def restart(self) -> None:
        self.moves.end_all()
        super().restart()


class ManualCopier:
    """Copies end by hand; refuses to write before the mark it was given."""

    def __init__(self, moves: Moves) -> None:
        self.moves, self.marks = moves, 0

    def copy(
        self, parts: Sequence[tuple[torch.Tensor, torch.Tensor]], *, urgent: bool = True, after: object | None = None
    ) -> Ticket:
        for _, dst in parts:
            dst.fill_(POISON)

        def carry() -> None:
            for src, dst in parts:
                dst.copy_(src)

        return self.moves.add(carry)

    def mark(self) -> object:
        self.marks += 1
        return self.marks

    def restart(self) -> None:
        self.moves.end_all()

    def close(self) -> None:
        self.moves.end_all()


class Silent:
    """A lookahead that guesses nothing by itself: the machine does."""

    is_asleep = False

    def __init__(self, prefetcher: PrefetchController) -> None:
        self._prefetcher = prefetcher

    def pending(self) -> dict[int, torch.Tensor]:
        return {}

    def router_spoke(self, layer_idx: int, expert_ids: Sequence[int]) -> None:
        self._prefetcher.router_spoke(layer_idx, expert_ids)

    def look(self, layer_idx: int, *, has_time: bool = False) -> None:
        """The machine's rules have guessed already."""

    def reset(self) -> None:
        """Nothing to forget."""


class CacheMachine(RuleBasedStateMachine):
    """Rules for whichever cache `open_tiers` makes."""

    tiny: TinyExperts
    cache: ExpertCache
    executor: Executor
    prefetcher: PrefetchController

    def __init__(self) -> None:
        super().__init__()
        self.opened = ExitStack()
        self.moves = Moves()
        self.is_bounded = True

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            self.cache.settle()
            self.moves.end_all()
            self.cache.poll()
            assert self.pending_bytes() == self.unused_ready_bytes()
        self.opened.close()

    @rule(key=st.sampled_from(KEYS), keep=st.sets(st.sampled_from(KEYS), max_size=3), admitted=st.booleans())
    def fetch_ahead(self, key: ExpertKey, keep: set[ExpertKey], admitted: bool) -> None:
        """Serve a miss elsewhere, past the prefetcher."""
        if self.cache.ahead_bytes + self.cache.num_bytes(key) > BUDGET_BYTES:
            return
        kept = {k for k in keep if self.cache.is_ready(k)}
        if admitted:
            self.cache.admit(key)
            return
        self.cache.start_ahead(key, keep=keep)
        assert all(self.cache.is_ready(k) for k in kept)

    @rule(
        layer_idx=st.integers(0, NUM_LAYERS - 1), experts=st.lists(st.integers(0, NUM_EXPERTS - 1), max_size=6),
        whole_layer=st.booleans(),
    )  # fmt: skip
    def guess(self, layer_idx: int, experts: list[int], whole_layer: bool) -> None:
        self.is_bounded = self.is_bounded and not whole_layer  # there slots are the bound
        self.prefetcher.request(layer_idx, experts, distance=1, whole_layer=whole_layer)

    @rule()
    def pump(self) -> None:
        ready = {key for key in self.prefetcher.wanted if self.cache.is_ready(key)}
        self.prefetcher.pump()
        assert self.cache.ahead_bytes <= BUDGET_BYTES or not self.is_bounded
        assert all(self.cache.is_ready(key) for key in ready)

    @rule(key=st.sampled_from(KEYS))
    def take_back(self, key: ExpertKey) -> None:
        was_coming = self.cache.is_coming(key)
        if self.cache.cancel_ahead(key):
            assert was_coming and not self.cache.is_coming(key) and not self.cache.is_ready(key)

    @rule(which=st.integers(0, 20))
    def something_arrives(self, which: int) -> None:
        waiting = [move for move in self.moves.under_way if not move.done()]
        if waiting:
            waiting[which % len(waiting)].arrive()

    @rule()
    def look(self) -> None:
        self.cache.poll()

    @rule()
    def the_next_move_fails(self) -> None:
        self.moves.fail_next = True

    @rule(layer_idx=st.integers(0, NUM_LAYERS - 1), num_tokens=st.sampled_from([1, 1, 2, 5]), seed=st.integers(0, 50))
    def run_a_layer(self, layer_idx: int, num_tokens: int, seed: int) -> None:
        call = Call(layer_idx, num_tokens, seed)
        before = self.cache.counters.copy()
        try:
            y_TD = call.run(self.executor)
        except DiskReadError:
            self.check_at_rest()
            return
        torch.testing.assert_close(y_TD, call.eager(self.tiny), rtol=1e-5, atol=1e-5)
        spent = self.cache.counters.copy().minus(before)
        assert spent.lookups == len(call.experts)
        self.check_at_rest()

    @rule()
    def a_call_is_broken_off(self) -> None:
        self.executor.recover()
        self.check_at_rest()
        assert self.cache.ahead_bytes == 0
        assert self.prefetcher.num_pending == 0

    def attach(self, cache: ExpertCache, **options: Any) -> None:
        """The engine's own parts around `cache`."""
        self.cache = cache
        self.prefetcher = PrefetchController(cache, budget_bytes=BUDGET_BYTES, mode=2)
        ahead = PrefetchCoordinator(
            cast("Lookahead", Silent(self.prefetcher)), self.prefetcher, order=range(NUM_LAYERS)
        )
        self.executor = Executor(cache, ahead=ahead, **options)

    def check_at_rest(self) -> None:
        assert "| 0 held |" in repr(self.cache), repr(self.cache)

    @invariant()
    @precondition(lambda self: hasattr(self, "cache"))
    def books_agree(self) -> None:
        self.cache.slots.check_integrity()
        counters = self.cache.counters
        assert self.cache.ahead_bytes >= 0
        assert counters.ahead_bytes == counters.ahead_used_bytes + counters.ahead_wasted_bytes + self.pending_bytes()
        assert self.prefetcher.num_pending <= len(self.cache.books.unused)

    @invariant()
    @precondition(lambda self: hasattr(self, "cache"))
    def what_is_ready_is_what_the_file_holds(self) -> None:
        for key in KEYS:
            if self.cache.is_ready(key):
                weights = self.cache.contents.find(key)
                assert weights is not None
                gate, up, down = self.tiny.matrices(key)
                assert torch.equal(torch.cat(weights.up), torch.cat([gate, up])), key
                assert torch.equal(torch.cat(weights.down, dim=1), down), key

    def pending_bytes(self) -> int:
        return sum(self.cache.num_bytes(key) for key in self.cache.books.unused)

    def unused_ready_bytes(self) -> int:
        return sum(self.cache.num_bytes(key) for key in self.cache.books.unused if self.cache.is_ready(key))


class OneTier(CacheMachine):
    """Disk to RAM."""

    @initialize(num_slots=st.integers(2, 7))
    def open(self, num_slots: int) -> None:
        self.tiny = tiny_experts()
        disk_type = type("Disk", (ManualDisk,), {"moves": self.moves})
        opened = self.opened.enter_context(open_cache(self.tiny, num_slots=num_slots, disk_type=disk_type))
        self.attach(opened.cache)


class ForcedCpu:
    """Sends every other miss to RAM."""

    def place(
        self, layer_idx: int, late: Sequence[ExpertKey], missing: Sequence[ExpertKey], rows: dict[ExpertKey, int]
    ) -> set[ExpertKey]:
        assert {*late, *missing} == set(rows)
        return {*late[::3], *missing[::2]}

    def served(self, keys: Sequence[ExpertKey]) -> None:
        assert keys


class TwoTierMachine(CacheMachine):
    """RAM to a device, over disk."""

    @initialize(host_slots=st.integers(2, 16), device_slots=st.integers(2, 7), on_cpu=st.booleans())
    def open(self, host_slots: int, device_slots: int, on_cpu: bool) -> None:
        self.tiny = tiny_experts()
        disk_type = type("Disk", (ManualDisk,), {"moves": self.moves})
        tiers = self.opened.enter_context(
            open_two_tiers(
                self.tiny,
                ManualCopier(self.moves),
                host_slots=host_slots,
                device_slots=device_slots,
                disk_type=disk_type,
            )
        )
        self.tiers = tiers
        cpu = CpuExperts(tiers.host, tiers.link.settle) if on_cpu else None
        if cpu is not None:
            self.opened.callback(cpu.close)
        self.attach(tiers.cache, cpu=cpu, placer=ForcedCpu() if on_cpu else None)

    @invariant()
    @precondition(lambda self: hasattr(self, "cache"))
    def the_lower_tier_agrees_too(self) -> None:
        self.tiers.host.slots.check_integrity()

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            self.cache.settle()
            self.moves.end_all()
            self.tiers.assert_at_rest()
        super().teardown()


_TINY: dict[str, TinyExperts] = {}


def tiny_experts() -> TinyExperts:
    """Made once; hypothesis gives machines no fixtures."""
    if not _TINY:
        _TINY["folder"] = make_tiny_experts(Path(mkdtemp()))
    return _TINY["folder"]


MACHINE_SETTINGS = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestOneTier = OneTier.TestCase
TestOneTier.settings = MACHINE_SETTINGS
TestTwoTiers = TwoTierMachine.TestCase
TestTwoTiers.settings = MACHINE_SETTINGS
