"""Whether to prefetch: for the whole model by the time of token passes; for each layer, and each distance from which
it is guessed, by bytes and the time they cost.

Recall decides nothing here. Predictions may be good and still not pay (the link is busy as it is, predicting takes
longer than it hides), or be poor and pay (the link would be idle otherwise).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from offmoe.base.trial import Trial
from offmoe.prefetch.audit import Audit

Mode = Literal["auto", "off"] | int

# Calls of a layer in one judgement: some hundred fetches at top-8. A comparison of the whole may be shorter.
WINDOW_CALLS, FEWEST_CALLS = 32, 16
# Calls that a layer sits out after a bad window, doubled after each further one.
FIRST_PAUSE_CALLS, LAST_PAUSE_CALLS = 64, 4096
# What a wasted byte costs where the link had time for it, as a share of what a byte fetched on demand costs: it took a
# slot, and the key that was evicted for it may be missed later.
IDLE_WASTE_PRICE = 1 / 8


class LayerSwitch:
    """On or off for one layer at one distance. Starts on; a window that lost time switches it off for a while, each
    time for longer.
    """

    __slots__ = ("_calls", "_latest", "_next_pause", "_ns_per_byte", "_start", "pause_left")

    def __init__(self) -> None:
        self.pause_left = 0
        self._next_pause = FIRST_PAUSE_CALLS
        self._ns_per_byte = 0.0
        self._start = self._latest = (0, 0, 0, 0)
        self._calls = 0

    @property
    def is_on(self) -> bool:
        """The present verdict."""
        return not self.pause_left

    @property
    def is_full(self) -> bool:
        """The window has enough calls for a verdict."""
        return self._calls >= WINDOW_CALLS

    def called(self, totals: tuple[int, int, int, int], ns_per_byte: float) -> None:
        """It ran with prefetching. `totals`: hidden ns, predicting ns, wasted bytes, bytes that came behind."""
        self._calls += 1
        self._latest, self._ns_per_byte = totals, ns_per_byte

    def judge(self) -> None:
        """End the window; too few calls are no evidence."""
        if self._calls >= FEWEST_CALLS:
            if self._gain_ns() < 0:
                self.pause_left = self._next_pause
                self._next_pause = min(2 * self._next_pause, LAST_PAUSE_CALLS)
            else:
                self._next_pause = max(self._next_pause // 2, FIRST_PAUSE_CALLS)
        self.begin_window()

    def begin_window(self) -> None:
        """Count from here."""
        self._calls, self._start = 0, self._latest

    def _gain_ns(self) -> float:
        """Time hidden since the window began, less what predicting and the wasted bytes cost.

        Where predicted and needed experts came behind, for want of time on the link, each wasted byte took the place
        of one of theirs.
        """
        hidden_ns, predict_ns, wasted, behind = (
            now - then for now, then in zip(self._latest, self._start, strict=True)
        )
        price = min(wasted, behind) + IDLE_WASTE_PRICE * max(0, wasted - behind)
        return hidden_ns - predict_ns - price * self._ns_per_byte


class Switch:
    """How many layers ahead to prefetch now (0: not at all), and for which layers."""

    def __init__(self, mode: Mode, *, distances: Sequence[int] = (1,), trial: Trial[int] | None = None) -> None:
        """`mode`: "off", a fixed distance, or "auto": `trial` chooses among 0 (not at all) and `distances`.

        A distance of 3 stands for 0 to 3: of these each layer keeps those that pay.
        """
        self._mode, self._distances = mode, tuple(distances)
        self._is_observing = False
        self._trial: Trial[int] | None = None
        if mode == "auto":
            self._trial = Trial((0, *self._distances)) if trial is None else trial
            self.distance = self._trial.current
        else:
            self.distance = 0 if mode == "off" else mode
        self._layers: dict[tuple[int, int], LayerSwitch] = {}

    def __repr__(self) -> str:
        off = len({layer_idx for (layer_idx, _), layer in self._layers.items() if not layer.is_on})
        return f"<Switch {self._mode} [distance {self.distance}, {off} layers off]>"

    @property
    def trial(self) -> Trial[int] | None:
        """What chooses; None where the user has."""
        return self._trial

    @property
    def allows_whole_layers(self) -> bool:
        """True unless prefetching is off by the user's word: a prefill that touches all experts is no prediction."""
        return self._mode not in ("off", 0)

    def layer_is_on(self, layer_idx: int, distance: int = 1) -> bool:
        """True when prefetching for this layer, guessed at this distance, pays as far as is known."""
        layer = self._layers.get((layer_idx, distance))
        return layer is None or layer.is_on

    def layer_called(self, layer_idx: int, audit: Audit) -> None:
        """The layer has run; judge it when a window is full. A fixed distance is the user's word and is not judged.

        While the whole is being compared no verdict changes, or the settings compared would not stay the same.
        """
        if self._trial is None:
            return
        is_comparing = self._trial.is_comparing
        for distance in range(max(self._distances) + 1):
            layer = self._layers.get((layer_idx, distance))
            if layer is None:
                layer = self._layers[layer_idx, distance] = LayerSwitch()
            if layer.pause_left:
                layer.pause_left -= not is_comparing
            elif self.distance >= max(distance, 1):
                sums = audit.layer(layer_idx, distance)
                spent_ns = sums.predict_ns - sums.predict_hidden_ns
                totals = (sums.hidden_ns, spent_ns, sums.wasted_bytes, sums.behind_bytes)
                layer.called(totals, audit.rate.ns_per_byte)
                if layer.is_full and not is_comparing:
                    layer.judge()

    def pass_ended(self, seconds: float, *, num_tokens: int) -> None:
        """One forward pass took `seconds`; the distance stays the same within a pass."""
        if self._trial is None or num_tokens != 1:
            return
        was_comparing = self._trial.is_comparing
        self._is_observing = True
        self._trial.observe(self.distance, seconds, 1)
        self._is_observing = False
        self.distance = self._trial.current
        if self._trial.is_comparing != was_comparing:
            for layer in self._layers.values():
                if was_comparing:
                    layer.judge()
                layer.begin_window()

    def reset(self) -> None:
        """A call was broken off. Comparisons whose sums were broken off with it are no longer to be trusted."""
        if self._is_observing and self._trial is not None:
            turns = self._trial.turns
            if turns is not None:
                turns.give_back(self._trial)
            self._trial = Trial((0, *self._distances))
            self._trial.turns = turns
        self._is_observing = False
        if self._trial is not None:
            self.distance = self._trial.current

    def as_dict(self) -> dict[str, object]:
        """The state, for `stats()`. `layers_off`: layers that are not guessed at any distance."""
        off: dict[int, set[int]] = {}
        for (layer_idx, distance), layer in self._layers.items():
            if not layer.is_on:
                off.setdefault(layer_idx, set()).add(distance)
        far = set(range(1, max(self._distances) + 1))
        told: dict[str, object] = {
            "mode": self._mode, "distance": self.distance,
            "layers_off": sorted(layer_idx for layer_idx, distances in off.items() if far <= distances),
        }  # fmt: skip
        if max(self._distances) > 1:
            told["distances_off"] = {str(layer_idx): sorted(distances) for layer_idx, distances in sorted(off.items())}
        return told
