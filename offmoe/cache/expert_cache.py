"""Experts in the slots of one tier: find, fetch, hold, evict; on demand and ahead of time.

The same class serves both tiers; a `BackingStore` says where the bytes come from (cache/backing_store.py).

Concurrency. One thread (the one that runs the model) calls everything here. Bytes arrive on threads or streams of the
tier below, into slots that are FILLING; a FILLING slot is nobody's until its ticket was waited for, and a READY slot is
only read. A slot is reused after eviction, which requires READY and no hold, so nothing writes to it and no
computation that this thread started can be using it (a device's queued work: see HostStore).

A fetch is *ahead* when no computation waits for it (a prefetch). How each ended is in `books`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence, Set

from offmoe.cache.backing_store import BackingStore
from offmoe.cache.contents import Contents
from offmoe.cache.fetch import Fetch, wait_out
from offmoe.cache.policy import KeepAllPolicy, Policy
from offmoe.cache.prefetch_ledger import PrefetchTracker
from offmoe.core.counters import Counters
from offmoe.core.keys import ExpertKey
from offmoe.formats.dense import ExpertWeights

# An expert that is used elsewhere replaces one that was used less than 1 / so many times as often.
FAR_MORE_OFTEN = 2


class ExpertCache:
    """Expert weights in `num_slots` slots of one tier, for `num_layers` MoE layers."""

    def __init__(
        self, num_slots: int, num_layers: int, source: BackingStore, policy: Policy, counters: Counters
    ) -> None:
        self._source, self.policy, self.counters = source, policy, counters
        self.contents = Contents(num_slots, policy)
        self.slots = self.contents.slots
        self.books = PrefetchTracker(counters, source.num_bytes)
        self._num_layers = num_layers
        self._keeps_all = isinstance(policy, KeepAllPolicy)
        self._coming: dict[ExpertKey, Fetch] = {}
        self._layer_idx = num_layers
        self.on_layer: Callable[[int, Sequence[int] | None], None] | None = None
        self.on_recover: Callable[[], None] | None = None

    def __repr__(self) -> str:
        table = repr(self.slots).removeprefix("<SlotTable [").removesuffix("]>")
        return f"<ExpertCache [{table} | {self.counters.hits} hits, {self.counters.misses} misses]>"

    @property
    def num_slots(self) -> int:
        """Experts that fit."""
        return len(self.slots)

    @property
    def slots_per_layer(self) -> int:
        """A layer's fair share of the slots."""
        return self.num_slots // self._num_layers

    @property
    def guesses(self) -> Set[ExpertKey]:
        """Keys that were fetched for the next call of their layer, which has not run yet."""
        return self.books.guesses

    @property
    def ahead_bytes(self) -> int:
        """Bytes of fetches ahead of time that are under way."""
        return self.books.under_way_bytes

    def begin_layer(self, layer_idx: int, ids: Sequence[int] | None = None) -> None:
        """A layer call begins, here and in the tier below. Where the layers begin again, so does a token pass.

        `ids`: what all its tokens chose, with PADDING; None where only the misses of the tier above will be heard of.
        """
        if layer_idx <= self._layer_idx and not self._keeps_all:
            self.policy.token_pass()
        self._layer_idx = layer_idx
        if self.on_layer is not None:
            self.on_layer(layer_idx, ids)
        if self._source.host is not None:
            self._source.host.begin_layer(layer_idx)

    def num_bytes(self, key: ExpertKey) -> int:
        """Bytes that fetching `key` moves."""
        return self._source.num_bytes(key)

    def is_ready(self, key: ExpertKey) -> bool:
        """True when `key` can be used at once."""
        return self.contents.is_ready(key)

    def is_coming(self, key: ExpertKey) -> bool:
        """True when `key` is on its way."""
        fetch = self._coming.get(key)
        return fetch is not None and not fetch.doomed

    @property
    def is_demanded(self) -> bool:
        """Something is on its way that a computation, or the tier above, asked for."""
        return any(not fetch.ahead for fetch in self._coming.values())

    def use(self, key: ExpertKey, *, touch: bool) -> ExpertWeights:
        """Hold a READY key and return its weights; `touch` tells the policy. Release it afterwards."""
        weights = self.contents.find(key)
        assert weights is not None, f"{key=} is not ready"
        self.slots.hold(self.slot_of(key))
        if touch:
            self.policy.touched(key)
        self.books.used(key)
        return weights

    def ready(self, keys: Sequence[ExpertKey]) -> list[ExpertWeights] | None:
        """The weights of all `keys`, or None when one is not READY. Not held: use them before anything is fetched."""
        found = []
        find, weights_of = self.slots.find, self.contents.weights
        for key in keys:
            slot = find(key)
            weights = None if slot is None else weights_of[slot]
            if weights is None:
                return None
            found.append(weights)
        return found

    def touch(self, layer_idx: int, expert_ids: Sequence[int]) -> None:
        """READY experts of a layer were used without being held."""
        if self._keeps_all and not self.books.unused:
            return
        for expert_idx in sorted(set(expert_ids)):
            key = ExpertKey(layer_idx, expert_idx)
            self.policy.touched(key)
            self.books.used(key)

    def take_next(self, slot: int) -> bool:
        """Make the slot behind `slot` a part of it, for an expert that is larger; False where it is in use."""
        victim, is_taken = self.contents.take_next(slot)
        if victim is not None:
            self.counters.evictions += 1
            self._wasted_ahead(victim)
        return is_taken

    def slot_of(self, key: ExpertKey) -> int:
        """The slot of a key that is held."""
        return self.contents.slot_of(key)

    def release(self, keys: Iterable[ExpertKey]) -> None:
        """Undo one `use` or `finish` of each key. Whatever was queued on the device until now may read their slots."""
        slots = [self.slot_of(key) for key in keys]
        self._source.used(slots)
        for slot in slots:
            self.slots.release(slot)

    def start(self, key: ExpertKey, *, cold: bool, urgent: bool = True) -> Fetch | None:
        """Begin fetching `key` for a computation; None when no slot can be freed now.

        A key that is coming already is not fetched twice: its fetch is returned, and overtakes others when `urgent`.
        """
        fetch = self._coming.get(key)
        if fetch is not None and fetch.doomed:
            self._end_ahead(fetch)
            fetch = None
        if fetch is not None:
            fetch.ahead = False
            if urgent:
                fetch.ticket.promote()
            if not cold:
                self.policy.touched(key)
            return fetch
        return self._begin(key, lambda: self._victim_on_demand(key.layer_idx), cold=cold, urgent=urgent)

    def start_ahead(self, key: ExpertKey, *, keep: Collection[ExpertKey]) -> bool:
        """Begin fetching `key` before anybody needs it, into a free slot or a victim's that is not in `keep`.

        It is a guess: inserted cold, kept until the next call of its layer, and then right or wrong. False when there
        is no such slot.
        """
        if self.slots.find(key) is not None:
            return False
        refused = (keep.__contains__, self.books.guesses.__contains__)
        fetch = self._begin(key, lambda: self.contents.victim(key.layer_idx, *refused), cold=True, urgent=False)
        if fetch is None:
            return False
        fetch.ahead = True
        self.books.began(key, is_guess=True)
        return True

    def admit(self, key: ExpertKey) -> bool:
        """Begin fetching `key`, which was used where it lies on the tier below, to stay here.

        Into a free slot, or where it was used far more often of late than what would go for it. One such at a time.

        Admission by frequency (Einziger et al., TinyLFU, 2017), with a margin: of two experts that are used alike
        neither goes for the other.
        """
        usage, layer_idx = self.policy.usage, key.layer_idx
        count, victim = usage.counts.get(key, 0) + 1, None
        may_begin = not self.books.under_way_bytes and self.slots.find(key) is None
        if may_begin and not self.slots.num_free:
            victim = self.contents.victim(layer_idx, self.books.guesses.__contains__)
            may_begin = victim is not None and count > FAR_MORE_OFTEN * usage.counts.get(victim, 0)
        fetch = self._begin(key, lambda: victim, cold=False, urgent=False) if may_begin else None
        if fetch is None:
            usage.note(key)
            return False
        fetch.ahead = True
        self.books.began(key, is_guess=False)
        return True

    def _victim_on_demand(self, layer_idx: int) -> ExpertKey | None:
        """A guess whose layer has not run yet goes only when nothing else can."""
        victim = self.contents.victim
        guesses = self.books.guesses
        return (victim(layer_idx, guesses.__contains__) if guesses else None) or victim(layer_idx)

    def _begin(
        self, key: ExpertKey, choose_victim: Callable[[], ExpertKey | None], *, cold: bool, urgent: bool
    ) -> Fetch | None:
        if not self.slots.num_free:
            victim = choose_victim()
            if victim is None:
                return None
            self.contents.evict(victim)
            self.counters.evictions += 1
            self._wasted_ahead(victim)
        slot = self.slots.reserve(key)
        ticket = None
        try:
            ticket = self._source.start(key, slot, urgent=urgent)
        finally:
            if ticket is None:
                self.slots.mark_failed(slot)
        if ticket is None:
            return None
        self.policy.inserted(key, cold=cold)
        fetch = self._coming[key] = Fetch(key, slot, ticket)
        return fetch

    def finish(self, fetch: Fetch) -> ExpertWeights:
        """Wait for a fetch, hold the key and return its weights. On failure the slot is freed and the error raised."""
        if self._coming.get(fetch.key) is not fetch:  # somebody else has waited for it
            return self.use(fetch.key, touch=False)
        try:
            fetch.ticket.wait()
            self._arrived(fetch)
        except BaseException:
            self.abandon([fetch])
            raise
        self.books.used(fetch.key)
        self.slots.hold(fetch.slot)
        weights = self.contents.find(fetch.key)
        assert weights is not None, f"{fetch=}"
        return weights

    def _arrived(self, fetch: Fetch) -> None:
        self.contents.fill(fetch.key, fetch.slot, self._source.contents(fetch.key, fetch.slot))
        self._forget_coming(fetch)
        self.slots.mark_ready(fetch.slot)

    def _forget_coming(self, fetch: Fetch) -> None:
        if self._coming.pop(fetch.key, None) is not None:
            self.books.landed(fetch.key)

    def poll(self) -> None:
        """Settle prefetches that have arrived: READY, or free again when its fetch failed. Never blocks."""
        self._source.poll()
        for fetch in [fetch for fetch in self._coming.values() if fetch.ahead and fetch.ticket.done()]:
            self._end_ahead(fetch)

    def settle(self) -> None:
        """Wait until nothing fetched ahead is under way: every slot is then READY, held, or somebody's demand."""
        for fetch in [fetch for fetch in self._coming.values() if fetch.ahead]:
            fetch.ticket.cancel()
            self._end_ahead(fetch)
        self._source.settle()

    def cancel_ahead(self, key: ExpertKey) -> bool:
        """Take back a fetch that nobody waits for, unless it is too far gone. True when it will not arrive.

        Its slot is free again once `poll` finds that what had begun has ended.
        """
        fetch = self._coming.get(key)
        if fetch is None or not fetch.ahead or fetch.doomed or not fetch.ticket.cancel():
            return False
        fetch.doomed = True
        self._wasted_ahead(key)
        if fetch.ticket.done():
            self._end_ahead(fetch)
        return True

    def expire_ahead(self, layer_idx: int, needed: Collection[ExpertKey]) -> None:
        """Layer `layer_idx` runs now and needs `needed`: every other guess for it was wrong."""
        for key in [key for key in self.books.guesses if key.layer_idx == layer_idx and key not in needed]:
            self.cancel_ahead(key)
            self._wasted_ahead(key)

    def _end_ahead(self, fetch: Fetch) -> None:
        """The end of a fetch that nobody asked to be told of: a failure is for the demand that comes later."""
        try:
            fetch.ticket.wait()
            self._arrived(fetch)
        except Exception:  # noqa: BLE001 - read again, and told, on demand
            self.abandon([fetch])

    def _wasted_ahead(self, key: ExpertKey) -> None:
        self.books.wasted(key, is_under_way=key in self._coming)

    def abandon(self, fetches: Iterable[Fetch]) -> None:
        """Free the slots of fetches that nobody will finish, after their moves have ended (they may still write).

        A KeyboardInterrupt meanwhile is raised at the end: a slot left FILLING would be lost for good.
        """
        interrupt: BaseException | None = None
        for fetch in fetches:
            if self._coming.get(fetch.key) is not fetch:
                continue
            interrupt = wait_out(fetch) or interrupt
            self._forget_coming(fetch)
            self._wasted_ahead(fetch.key)
            self.contents.fail(fetch.key, fetch.slot)
        if interrupt is not None:
            raise interrupt

    def recover(self) -> None:
        """Put the books in order after a call was broken off between any two lines (Ctrl-C). Afterwards nothing is
        held and nothing is under way; what was READY stays, in the order in which the policy would let it go.
        """
        self._source.restart()
        self._coming.clear()
        self.books.recover()
        self.contents.recover()
        if self.on_recover is not None:
            self.on_recover()

    def close(self) -> None:
        """Drop every view of the pool. No `use` or `start` afterwards."""
        self.contents.clear()
