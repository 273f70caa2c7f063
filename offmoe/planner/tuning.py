"""Cache size against speed, from a trace and what was measured: curves, their knee, and which flags to choose.

Plain arithmetic on plain numbers: nothing here loads a model or knows a clock.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from offmoe.cache.policy import POLICY_NAMES
from offmoe.cache.replay import ReplayResult, layer_calls, lru_curve, replay_belady, replay_calls
from offmoe.core.errors import TraceError
from offmoe.machine.costs import TokenSample
from offmoe.trace.file import Trace

# Of all experts: where curves are computed.
SHARES = (1 / 16, 1 / 8, 3 / 16, 1 / 4, 5 / 16, 3 / 8, 7 / 16, 1 / 2, 5 / 8, 3 / 4, 7 / 8, 1)
BOUND = "belady"
UNUSUAL = 5


@dataclass(frozen=True, kw_only=True)
class TokenCosts:
    """Cost of a decoded token on this machine. `fixed_s`: with all its experts in memory, in seconds.

    `fetch_bytes_per_s`: bytes of missing experts over the seconds that decoding stood still for them.
    `waiting_call_s`: what a layer call that has to fetch takes besides.
    """

    fixed_s: float
    fetch_bytes_per_s: float
    waiting_call_s: float = 0.0

    def tok_per_s(self, missed_bytes_per_token: float, waiting_calls_per_token: float = 0.0) -> float:
        """Tokens a second: one over (fixed time + bytes to fetch / rate of fetching + calls that fetch * their time).
        Without prefetching.
        """
        fetch_s = missed_bytes_per_token / self.fetch_bytes_per_s + waiting_calls_per_token * self.waiting_call_s
        return 1 / (self.fixed_s + fetch_s)


def token_costs(samples: Sequence[TokenSample]) -> TokenCosts | None:
    """Costs from the tokens of a run without prefetching; those of more than five times the median time are left out:
    then the machine did something else.

    The time that is not waiting is split, by least squares, into what every token takes and what each call adds that
    had to fetch. None where nothing had to be fetched, or nothing was decoded: the rate of fetching is not known then.
    """
    if not samples:
        return None
    longest_s = UNUSUAL * statistics.median(sample.step_s for sample in samples)
    usual = [sample for sample in samples if sample.step_s <= longest_s]
    stall_s, fetched_bytes = sum(sample.stall_s for sample in usual), sum(sample.fetched_bytes for sample in usual)
    work_s = [sample.step_s - sample.stall_s for sample in usual]
    waiting = [sample.num_waiting for sample in usual]
    mean_s, mean_waiting = statistics.fmean(work_s), statistics.fmean(waiting)
    if stall_s <= 0 or fetched_bytes <= 0 or mean_s <= 0:
        return None
    spread = sum((count - mean_waiting) ** 2 for count in waiting)
    together = sum((count - mean_waiting) * seconds for count, seconds in zip(waiting, work_s, strict=True))
    call_s = max(0.0, together / spread) if spread else 0.0
    fixed_s = mean_s - call_s * mean_waiting
    if fixed_s < min(work_s):  # no token was that fast: the slope is more than the samples can tell
        fixed_s = min(work_s)
        call_s = (mean_s - fixed_s) / mean_waiting if mean_waiting else 0.0
    return TokenCosts(fixed_s=fixed_s, fetch_bytes_per_s=fetched_bytes / stall_s, waiting_call_s=call_s)


@dataclass(frozen=True, kw_only=True)
class Point:
    """One policy at one size, while decoding. `tok_per_s` is None where costs are not known."""

    num_slots: int
    hit_rate: float
    missed_bytes_per_token: float
    tok_per_s: float | None


@dataclass(frozen=True, kw_only=True)
class Curves:
    """By policy, the same sizes in each. `adopted`: the policy that fetches least at `fit`, or at a quarter.

    `fit`: the largest size that memory allows, if that is known. `knee`: where more slots begin to bring less.
    """

    num_experts: int
    slot_bytes: int
    num_tokens: int
    by_policy: dict[str, list[Point]]
    adopted: str
    knee: int
    fit: int | None

    @property
    def sizes(self) -> list[int]:
        """Slots, ascending."""
        return [point.num_slots for point in next(iter(self.by_policy.values()))]

    def at(self, policy: str, num_slots: int) -> Point:
        """One point; `num_slots` is one of `sizes`."""
        return next(point for point in self.by_policy[policy] if point.num_slots == num_slots)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def make_curves(
    trace: Trace, *, costs: TokenCosts | None, fit: int | None = None, slot_bytes: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Curves:  # fmt: skip
    """Replay `trace` at the usual sizes and at `fit`: LRU, Belady's bound, and the adopted policy, which is the one
    that fetches least at `fit`, or where that is not known at a quarter of all experts.

    Raises TraceError for a trace in which nothing was decoded.
    """
    header, calls = trace.header, layer_calls(trace.events)
    num_tokens = trace.num_decoded
    if not num_tokens:
        raise TraceError("the trace has prompts only, no decoded token; record it with --max-new-tokens 2 or more")
    sizes = curve_sizes(header.num_experts, top_k=header.top_k, fit=fit)

    def point(result: ReplayResult) -> Point:
        missed = result.decode.missed_bytes / num_tokens
        return Point(
            num_slots=result.num_slots, hit_rate=result.decode.hit_rate, missed_bytes_per_token=missed,
            tok_per_s=costs.tok_per_s(missed, result.decode.waiting_calls / num_tokens) if costs else None,
        )  # fmt: skip

    def run(policy: str, size: int) -> ReplayResult:
        return replay_calls(calls, policy, size, top_k=header.top_k, expert_bytes=header.expert_bytes)

    def replays() -> Iterator[ReplayResult]:
        yield from (run(policy, trial_size) for policy in POLICY_NAMES)
        least = header.num_layers * header.top_k  # with fewer slots LRU has a share for each layer
        yield from (run("lru", size) if size < least else lru.at(size) for size in sizes)
        yield from (replay_belady(calls, size, header.expert_bytes) for size in sizes)
        if adopted != "lru":
            yield from (run(adopted, size) for size in sizes)

    lru = lru_curve(calls, header.experts_per_layer, header.expert_bytes)
    trial_size = fit or min(sizes, key=lambda size: abs(size - header.num_experts / 4))
    trials: list[ReplayResult] = []
    by_policy: dict[str, list[Point]] = {}
    adopted = "lru"
    total = len(POLICY_NAMES) + 3 * len(sizes)
    for done, result in enumerate(replays(), start=1):
        progress(done, total)
        if done > len(POLICY_NAMES):
            by_policy.setdefault(result.name, []).append(point(result))
            continue
        trials.append(result)
        adopted = min(trials, key=lambda one: (one.decode.missed_bytes, one.name != "lru")).name
    return Curves(
        num_experts=header.num_experts, slot_bytes=slot_bytes or max(header.expert_bytes), num_tokens=num_tokens,
        by_policy=by_policy, adopted=adopted, fit=fit, knee=_knee_of(by_policy[adopted]),
    )  # fmt: skip


def curve_sizes(num_experts: int, *, top_k: int, fit: int | None) -> list[int]:
    """Slots at which curves are drawn: shares of all experts that one layer's choices fit in, and `fit`."""
    least = min(top_k, num_experts)
    sizes = {max(least, round(share * num_experts)) for share in SHARES}
    return sorted(sizes | ({min(fit, num_experts)} if fit else set()))


def _knee_of(points: Sequence[Point]) -> int:
    values = [point.hit_rate if point.tok_per_s is None else point.tok_per_s for point in points]
    return knee([point.num_slots for point in points], values)


def knee(sizes: Sequence[int], values: Sequence[float]) -> int:
    """The size whose value is farthest above the straight line from the first to the last point (Satopaa et al.,
    "Finding a Kneedle in a Haystack", 2011); the smaller of equals. The last size where none is above it.
    """
    width, height = sizes[-1] - sizes[0], values[-1] - values[0]
    if width <= 0 or height <= 0:
        return sizes[0]
    above = [
        (value - values[0]) / height - (size - sizes[0]) / width for size, value in zip(sizes, values, strict=True)
    ]
    best = max(above)
    return sizes[above.index(best)] if best > 0 else sizes[-1]
