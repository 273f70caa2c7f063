"""Replays of a trace through a cache: any policy, LRU at every size at once, and what no policy can beat.

A layer call is one event. All the experts it needs are looked up before any is let in, however many tokens chose them,
so an expert counts once: a hit if it was there when the call began, else a miss. Phases are told apart: decoding is
what a cache is for, and a prompt before it fills the cache and disturbs it.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

from offmoe.cache.policy import make_policy, needs_quota
from offmoe.cache.shadow import ShadowCache
from offmoe.trace.recorder import TraceEvent


class ReplayedCall(NamedTuple):
    """One event. `rows_by_expert` in order of expert id; `starts_pass`: a token, or a piece of a prompt, begins."""

    layer_idx: int
    rows_by_expert: Mapping[int, int]
    is_prefill: bool
    starts_pass: bool


@dataclass(slots=True)
class Tally:
    """Sums of one phase: experts found and fetched, the bytes of these, and the calls that had to fetch something."""

    hits: int = 0
    misses: int = 0
    missed_bytes: int = 0
    waiting_calls: int = 0

    @property
    def lookups(self) -> int:
        """Experts asked for."""
        return self.hits + self.misses

    @property
    def hit_rate(self) -> float:
        """Share of the experts asked for that were there; 0 when none was."""
        return self.hits / self.lookups if self.lookups else 0.0

    def add(self, hits: int, misses: int, expert_bytes: int) -> None:
        """One call's."""
        self.hits += hits
        self.misses += misses
        self.missed_bytes += misses * expert_bytes
        self.waiting_calls += misses > 0


@dataclass(frozen=True, kw_only=True)
class ReplayResult:
    """Sums of a cache of `num_slots` experts."""

    name: str
    num_slots: int
    prefill: Tally = field(default_factory=Tally)
    decode: Tally = field(default_factory=Tally)

    def phase(self, call: ReplayedCall) -> Tally:
        """The tally that a call counts in."""
        return self.prefill if call.is_prefill else self.decode


def layer_calls(events: Iterable[TraceEvent]) -> list[ReplayedCall]:
    """The events of a trace as a cache sees them. A pass begins where the layers begin again."""
    calls: list[ReplayedCall] = []
    before = -1
    for event in events:
        starts = event.layer_idx <= before or before < 0
        calls.append(ReplayedCall(event.layer_idx, event.rows_by_expert(), event.is_prefill, starts))
        before = event.layer_idx
    return calls


def replay_calls(
    calls: Sequence[ReplayedCall], policy: str, num_slots: int, *, top_k: int, expert_bytes: Sequence[int]
) -> ReplayResult:
    """Replay the calls as the engine would with `num_slots` slots under `policy`, from empty, without prefetching."""
    num_layers = len(expert_bytes)
    shadow = ShadowCache(make_policy(policy), num_slots, num_layers, quota=needs_quota(num_slots, num_layers, top_k))
    result = ReplayResult(name=policy, num_slots=num_slots)
    for call in calls:
        found = shadow.call(call.layer_idx, call.rows_by_expert, starts_pass=call.starts_pass)
        result.phase(call).add(len(found.hits), len(found.misses), expert_bytes[call.layer_idx])
    return result


@dataclass(frozen=True, kw_only=True)
class _PhaseCurve:
    """A phase's curve: all lookups, their bytes and calls; and at each number of slots how many were hits, their bytes,
    and the calls that found all they needed.
    """

    lookups: int
    lookup_bytes: int
    num_calls: int
    hits: list[int]
    hit_bytes: list[int]
    served_calls: list[int]

    def at(self, num_slots: int) -> Tally:
        size = min(num_slots, len(self.hits) - 1)
        hits = self.hits[size]
        missed_bytes, waiting = self.lookup_bytes - self.hit_bytes[size], self.num_calls - self.served_calls[size]
        return Tally(hits, self.lookups - hits, missed_bytes, waiting)


@dataclass(frozen=True, kw_only=True)
class LruCurve:
    """LRU at every size, of `lru_curve`."""

    prefill: _PhaseCurve
    decode: _PhaseCurve

    def at(self, num_slots: int) -> ReplayResult:
        """Sums at `num_slots` slots; more than there are experts give what room for all of them does."""
        return ReplayResult(
            name="lru", num_slots=num_slots, prefill=self.prefill.at(num_slots), decode=self.decode.at(num_slots)
        )


def lru_curve(calls: Sequence[ReplayedCall], experts_per_layer: Sequence[int], expert_bytes: Sequence[int]) -> LruCurve:
    """LRU over all layers together, at every number of slots from 0 to all, in one pass over the calls.

    Mattson's stack distances (IBM Systems Journal 9, 1970), with a call as one event: an expert's distance is the
    number of distinct experts used since its own last use, up to the begin of this call, and it is a hit wherever that
    is less than the slots. After the call its experts are the most recent, in order of expert id. The engine's LRU
    differs in three things, which `replay_calls` has and no single pass can: within a call hits are older than misses;
    of a prompt's call that touches more than a layer's share of slots only the busiest experts are kept; and with fewer
    slots than one token needs, each layer has slots of its own.
    """
    num_experts = sum(experts_per_layer)
    first_key = [0, *accumulate(experts_per_layer)]
    num_at = [[0] * (num_experts + 1) for _ in range(2)]
    bytes_at = [[0] * (num_experts + 1) for _ in range(2)]
    calls_at = [[0] * (num_experts + 1) for _ in range(2)]  # by the largest distance in a call
    # Last uses of all experts used so far, ascending: an expert's distance is the number of entries above its own.
    times: list[int] = []
    last: dict[int, int] = {}
    now = 0
    for call in calls:
        phase, num_bytes = int(call.is_prefill), expert_bytes[call.layer_idx]
        keys = [first_key[call.layer_idx] + idx for idx in call.rows_by_expert]
        seen = [last[key] for key in keys if key in last]
        places = [bisect_left(times, time) for time in seen]
        for place in places:
            distance = len(times) - place - 1
            num_at[phase][distance] += 1
            bytes_at[phase][distance] += num_bytes
        # The last entry counts what was never seen before: no number of slots makes it a hit.
        num_at[phase][num_experts] += len(keys) - len(seen)
        bytes_at[phase][num_experts] += num_bytes * (len(keys) - len(seen))
        farthest = len(times) - min(places) - 1 if places and len(seen) == len(keys) else num_experts
        calls_at[phase][farthest] += 1
        for place in sorted(places, reverse=True):
            del times[place]
        for key in keys:
            last[key] = now
            times.append(now)
            now += 1
    decode, prefill = (
        _PhaseCurve(
            lookups=sum(num), lookup_bytes=sum(size), num_calls=sum(calls),
            hits=list(accumulate(num[:-1], initial=0)), hit_bytes=list(accumulate(size[:-1], initial=0)),
            served_calls=list(accumulate(calls[:-1], initial=0)),
        )
        for num, size, calls in zip(num_at, bytes_at, calls_at, strict=True)
    )  # fmt: skip
    return LruCurve(prefill=prefill, decode=decode)


def replay_belady(
    calls: Sequence[ReplayedCall], num_slots: int, expert_bytes: Sequence[int], *, foresight: int | None = None
) -> ReplayResult:
    """Belady's MIN with bypass: keeps the experts that are needed soonest, and none that is needed later than those.

    Nothing fetches fewer on demand. `foresight`: sees no further than so many passes beyond the present one, and takes
    what it does not see there for needed after all that it sees, the longer unused the later. None: sees all.
    """
    result = ReplayResult(name="belady" if foresight is None else f"belady-{foresight}", num_slots=num_slots)
    never = len(calls)
    keys_of = [[(call.layer_idx, idx) for idx in call.rows_by_expert] for call in calls]
    next_of = _next_uses(keys_of)
    pass_of = list(accumulate(int(call.starts_pass) for call in calls))
    horizon = 0  # the first call that is not seen yet
    # When each kept expert is needed: a call's number, or above `never` an expert that is not seen to be needed.
    needed: dict[tuple[int, int], int] = {}
    latest: list[tuple[int, tuple[int, int]]] = []  # a heap of (-needed, key), with outdated entries among them

    def keep(key: tuple[int, int], at: int) -> None:
        needed[key] = at
        heapq.heappush(latest, (-at, key))

    for call_idx, call in enumerate(calls):
        while horizon < never and (foresight is None or pass_of[horizon] <= pass_of[call_idx] + foresight):
            for key in keys_of[horizon] if foresight is not None else ():
                if needed.get(key, 0) > never:
                    keep(key, horizon)
            horizon += 1
        keys = keys_of[call_idx]
        times = [at if at < horizon else 2 * never - call_idx for at in next_of[call_idx]]
        is_hit = [key in needed for key in keys]
        result.phase(call).add(sum(is_hit), len(keys) - sum(is_hit), expert_bytes[call.layer_idx])
        for key, at, hit in zip(keys, times, is_hit, strict=True):
            if hit:
                keep(key, at)
        for key, at, hit in zip(keys, times, is_hit, strict=True):
            if hit:
                continue
            if len(needed) >= num_slots:
                while latest and needed.get(latest[0][1]) != -latest[0][0]:
                    heapq.heappop(latest)
                if not latest or -latest[0][0] <= at:
                    continue
                del needed[heapq.heappop(latest)[1]]
            keep(key, at)
    return result


def _next_uses(keys_of: Sequence[Sequence[tuple[int, int]]]) -> list[list[int]]:
    """For each key of each call the number of the next call that needs it; the number of calls where none does."""
    following: dict[tuple[int, int], int] = {}
    found: list[list[int]] = []
    for call_idx in range(len(keys_of) - 1, -1, -1):
        found.append([following.get(key, len(keys_of)) for key in keys_of[call_idx]])
        following.update(dict.fromkeys(keys_of[call_idx], call_idx))
    found.reverse()
    return found
