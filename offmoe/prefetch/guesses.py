"""Guesses of the routers of coming layers, written into a trace; nothing is fetched."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from offmoe.prefetch.lookahead import Predictor
from offmoe.trace.recorder import Recorder

MAX_DISTANCE = 3


class GuessWriter:
    """An observer of states (routers/routing.py) that asks the next three layers' routers about each token decoded.

    On a device each answer makes the host wait: for traces only. `order`: the layers as they run.
    """

    is_asleep = False

    def __init__(self, predictors: Sequence[Predictor | None], order: Sequence[int], recorder: Recorder) -> None:
        self._predictors, self._recorder = predictors, recorder
        self._coming = {
            layer_idx: list(enumerate(order[place + 1 : place + 1 + MAX_DISTANCE], start=1))
            for place, layer_idx in enumerate(order)
        }

    def observe_state(self, layer_idx: int, state_TX: torch.Tensor) -> None:
        """The state from which the layer's router chooses."""
        if state_TX.shape[0] != 1 or self._recorder.reading_prompt:
            return
        for distance, target_idx in self._coming[layer_idx]:
            predictor = self._predictors[target_idx]
            ids_1K = None if predictor is None else predictor(state_TX)
            if ids_1K is not None:
                self._recorder.guess(target_idx, distance, ids_1K[0].tolist())

    def observe_input(self, layer_idx: int, state_TX: torch.Tensor) -> None:
        """Not asked again: a trace holds guesses of whole layers ahead."""
