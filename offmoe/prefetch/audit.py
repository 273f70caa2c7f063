"""What prefetching did, layer by layer: named, moved, used, wasted, time hidden and time spent. Integers, no torch.

Each expert that was started ahead of time ends in exactly one of useful, wasted and cancelled:
`started == useful + wasted + cancelled + pending`, in experts and in bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

# Bytes after which the demand rate forgets half of what it knew: a few tokens' worth on any model.
RATE_WINDOW_BYTES = 1 << 30


@dataclass(slots=True, kw_only=True)
class LayerAudit:
    """Totals of one layer. Bytes are bytes, times are nanoseconds, the rest are experts.

    `named`: both predicted and needed; `covered`: needed, and fetched ahead (late ones too). `cancelled`: taken back
    before its move had ended. `behind`: predicted, needed, and not even started when the layer ran. `hidden_ns`: what
    the useful ones would have cost on demand, less `waited_ns`, which was waited for late ones. `predict_ns`: spent on
    predicting, of which `predict_hidden_ns` passed while the model would have waited for fetches anyway.
    """

    calls: int = 0
    predicted: int = 0
    needed: int = 0
    named: int = 0
    covered: int = 0
    started: int = 0
    useful: int = 0
    late: int = 0
    wasted: int = 0
    cancelled: int = 0
    started_bytes: int = 0
    useful_bytes: int = 0
    wasted_bytes: int = 0
    cancelled_bytes: int = 0
    behind_bytes: int = 0
    hidden_ns: int = 0
    waited_ns: int = 0
    predict_ns: int = 0
    predict_hidden_ns: int = 0

    @property
    def pending(self) -> int:
        """Started, and neither used nor given up yet."""
        return self.started - self.useful - self.wasted - self.cancelled

    @property
    def pending_bytes(self) -> int:
        """Bytes of the pending ones."""
        return self.started_bytes - self.useful_bytes - self.wasted_bytes - self.cancelled_bytes

    @property
    def recall(self) -> float:
        """Share of the needed experts that had been predicted, cached or not; 0 when none was needed."""
        return self.named / self.needed if self.needed else 0.0

    @property
    def coverage(self) -> float:
        """Share of the needed experts that were there, or coming, because of a prefetch; 0 when none was needed."""
        return self.covered / self.needed if self.needed else 0.0

    @property
    def accuracy(self) -> float:
        """Share of the prefetched bytes that were used; 0 when none has ended yet."""
        ended = self.useful_bytes + self.wasted_bytes
        return self.useful_bytes / ended if ended else 0.0

    def add(self, other: LayerAudit) -> None:
        """Add another layer's totals."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    def as_dict(self) -> dict[str, int | float]:
        """Name to value, for JSON; the shares are rounded to four digits."""
        counts: dict[str, int | float] = {field.name: getattr(self, field.name) for field in fields(self)}
        return counts | {
            "recall": round(self.recall, 4), "coverage": round(self.coverage, 4), "accuracy": round(self.accuracy, 4)
        }  # fmt: skip


class DemandRate:
    """Nanoseconds of stall for each byte that was fetched on demand, recent fetches weighing more."""

    def __init__(self, ns_per_byte: float = 0.0) -> None:
        """`ns_per_byte` is believed until the first demand fetch."""
        self._initial = ns_per_byte
        self._num_bytes = 0
        self._stall_ns = 0

    def observe(self, num_bytes: int, stall_ns: int) -> None:
        """`num_bytes` were fetched on demand and waited for `stall_ns`."""
        self._num_bytes += num_bytes
        self._stall_ns += stall_ns
        if self._num_bytes > RATE_WINDOW_BYTES:
            self._num_bytes //= 2
            self._stall_ns //= 2

    @property
    def ns_per_byte(self) -> float:
        """The rate."""
        return self._stall_ns / self._num_bytes if self._num_bytes else self._initial


# Weight of one more pass in the share of time for which the link is waited for.
BUSY_SMOOTHING = 1 / 16


class Audit:
    """Totals by layer and by how far ahead guesses were made, and the rate by which a prefetch is worth time."""

    def __init__(self, ns_per_byte: float = 0.0) -> None:
        self.rate = DemandRate(ns_per_byte)
        self._parts: dict[tuple[int, int], LayerAudit] = {}
        self._pass_stall_ns = 0
        self.busy = 0.0

    def layer(self, layer_idx: int, distance: int = 1) -> LayerAudit:
        """The totals of a layer's guesses at a distance; zeros at first."""
        key = (layer_idx, distance)
        found = self._parts.get(key)
        if found is None:
            found = self._parts[key] = LayerAudit()
        return found

    def called(
        self, layer_idx: int, *, predicted: int, needed: int, named: int, covered: int, behind_bytes: int,
        distance: int = 1,
    ) -> None:  # fmt: skip
        """The layer's router has spoken; the last guess about it was made at `distance`."""
        layer = self.layer(layer_idx, distance)
        layer.calls += 1
        layer.predicted += predicted
        layer.needed += needed
        layer.named += named
        layer.covered += covered
        layer.behind_bytes += behind_bytes

    def started(self, layer_idx: int, num_bytes: int, *, distance: int = 1) -> None:
        """A fetch ahead of time was begun."""
        layer = self.layer(layer_idx, distance)
        layer.started += 1
        layer.started_bytes += num_bytes

    def used(self, layer_idx: int, num_bytes: int, *, late: bool, waited_ns: int, distance: int = 1) -> None:
        """It was used. One that was waited for longer than a fetch on demand takes counts against the others."""
        layer = self.layer(layer_idx, distance)
        layer.useful += 1
        layer.useful_bytes += num_bytes
        layer.late += late
        layer.waited_ns += waited_ns
        layer.hidden_ns += int(num_bytes * self.rate.ns_per_byte) - waited_ns

    def wasted(self, layer_idx: int, num_bytes: int, *, distance: int = 1) -> None:
        """It came, or will come, for nothing."""
        layer = self.layer(layer_idx, distance)
        layer.wasted += 1
        layer.wasted_bytes += num_bytes

    def cancelled(self, layer_idx: int, num_bytes: int, *, distance: int = 1) -> None:
        """It was taken back before its move had begun."""
        layer = self.layer(layer_idx, distance)
        layer.cancelled += 1
        layer.cancelled_bytes += num_bytes

    def give_up_pending(self) -> None:
        """Whatever is pending will not be heard of again: wasted. Evens out what a broken-off call counted by half."""
        for layer in self._parts.values():
            layer.wasted += layer.pending
            layer.wasted_bytes += layer.pending_bytes

    def waited(self, layer_idx: int, waited_ns: int, *, distance: int = 1) -> None:
        """A late one that was used had been waited for, as is known now."""
        layer = self.layer(layer_idx, distance)
        layer.waited_ns += waited_ns
        layer.hidden_ns -= waited_ns

    def spent_predicting(self, layer_idx: int, predict_ns: int, hidden_ns: int = 0, *, distance: int = 1) -> None:
        """A prediction for the layer was made; `hidden_ns` of it while the model stood still anyway."""
        layer = self.layer(layer_idx, distance)
        layer.predict_ns += predict_ns
        layer.predict_hidden_ns += hidden_ns

    def demand_ended(self, num_bytes: int, stall_ns: int, late_ns: int) -> None:
        """The model stood still for `stall_ns`: `late_ns` for late prefetches, and for `num_bytes` on demand."""
        self._pass_stall_ns += stall_ns
        if num_bytes:
            self.rate.observe(num_bytes, max(0, stall_ns - late_ns))

    def pass_ended(self, seconds: float) -> None:
        """A token pass took `seconds`: `busy` is the share of recent ones that stood still for fetches, 0 to 1."""
        share = min(1.0, self._pass_stall_ns / max(seconds * 1e9, 1.0))
        self.busy += BUSY_SMOOTHING * (share - self.busy)
        self._pass_stall_ns = 0

    def total(self) -> LayerAudit:
        """All layers together."""
        return _sum(self._parts.values())

    def as_dict(self) -> dict[str, object]:
        """The whole, each layer by its number, and each distance, for `stats()`."""
        layers, distances = ({key[place] for key in self._parts} for place in (0, 1))
        by_layer, by_distance = (
            {
                str(number): _sum(part for key, part in self._parts.items() if key[place] == number).as_dict()
                for number in sorted(numbers)
            }
            for place, numbers in enumerate((layers, distances))
        )
        return {
            "ns_per_byte": round(self.rate.ns_per_byte, 6), "busy": round(self.busy, 4),
            "total": self.total().as_dict(), "layers": by_layer, "distances": by_distance,
        }  # fmt: skip


def _sum(parts: Iterable[LayerAudit]) -> LayerAudit:
    total = LayerAudit()
    for part in parts:
        total.add(part)
    return total
