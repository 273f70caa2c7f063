"""An engine that decodes given ids in blocks, so that several engines can take turns over the same text."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence

import torch

import offmoe
from offmoe.core.counters import Counters
from offmoe.engine.parts import parts_of


class GivenIds:
    """`token_s` has the seconds of every token since the last `restart`, `block_s` those of every block.

    `next_ids` are what the model would have chosen: they are told, and not fed.
    """

    def __init__(self, name: str, engine: offmoe.Engine, ids: Sequence[int], *, num_prompt: int) -> None:
        """Reads the prompt at once. The caller's engine is closed by `close`."""
        self.name, self.engine = name, engine
        self.next_ids: list[int] = []
        given: Iterator[int] = iter([*ids[num_prompt:], ids[0]])  # the last one chosen is never fed

        def choose(_: torch.Tensor, last: torch.Tensor) -> int:
            self.next_ids.append(int(last.float().argmax()))  # of bfloat16 torch's is four times slower
            return next(given)

        self._pieces = engine.stream(
            list(ids[:num_prompt]), max_new_tokens=len(ids) - num_prompt + 1, choose=choose, ignore_eos=True
        )
        next(self._pieces)
        self.restart()

    def restart(self) -> None:
        """Count from here: what came before was the warm-up."""
        self.token_s: list[float] = []
        self.block_s: list[float] = []
        self._before = self._counters()

    def run_block(self, num_tokens: int) -> None:
        """Decode the next `num_tokens` of the given ids."""
        seconds = []
        for _ in range(num_tokens):
            begin = time.perf_counter()
            next(self._pieces)
            seconds.append(time.perf_counter() - begin)
        self.token_s += seconds
        self.block_s.append(sum(seconds))

    def counts(self) -> Counters:
        """What was counted since the last `restart`."""
        return self._counters().minus(self._before)

    def _counters(self) -> Counters:
        return parts_of(self.engine).counters()

    def close(self) -> None:
        """End the engine."""
        self._pieces.close()
        self.engine.close()


def take_turns(systems: Sequence[GivenIds], *, num_blocks: int, block: int) -> Iterator[int]:
    """Blocks of `block` tokens, forwards and back (A B B A): what the machine does meanwhile falls on all alike.

    Yields how many were run.
    """
    for number in range(num_blocks):
        for system in systems if number % 2 == 0 else reversed(systems):
            system.run_block(block)
        yield number + 1


def compared(system: GivenIds, other: GivenIds) -> tuple[float, float]:
    """How many times as fast `system` was as `other`: over all blocks, and the median block's."""
    ratios = [b / a for a, b in zip(system.block_s, other.block_s, strict=True)]
    return sum(other.block_s) / sum(system.block_s), statistics.median(ratios)


class Toggled:
    """One engine whose prefetching is taken out of it in every other block, and put back.

    Two engines of equal settings differ by up to 6% for as long as they live (where their memory lies), which is more
    than prefetching that keeps itself off may cost; one engine does not differ from itself. Its blocks are of different
    text: a token's time is fitted as `a + b * experts not cached + c * on`, and `c` is what prefetching adds.
    """

    def __init__(self, system: GivenIds, expert_bytes: int) -> None:
        serving = parts_of(system.engine).serving
        assert serving.ahead is not None, "the engine does not fetch ahead"
        self._system, self._ahead, self._expert_bytes = system, serving.ahead, expert_bytes
        self._executor = serving.executor._executor  # type: ignore[attr-defined]
        self._samples: list[tuple[bool, float, float]] = []

    def run(self, num_tokens: int, *, on: bool) -> None:
        """Decode a block, with prefetching or without; what was under way is let go before. The first token settles."""
        lookahead = self._ahead.lookahead
        if on:
            self._executor.ahead = self._ahead
            lookahead.reset()
        else:
            self._executor.ahead = None
            lookahead.sleep()
        for number in range(num_tokens):
            before = self._system.counts()
            self._system.run_block(1)
            spent = self._system.counts().minus(before)
            if number:
                uncached = spent.misses + spent.ahead_used_bytes / self._expert_bytes
                self._samples.append((on, self._system.token_s[-1], uncached))

    def ratio(self) -> tuple[float, float]:
        """Speed with prefetching over that without, on the same tokens, and its standard error.

        Tokens of more than three times the median are left out: then the machine did something else.
        """
        import numpy as np

        longest_s = 3 * statistics.median(seconds for _, seconds, _ in self._samples)
        usual = [sample for sample in self._samples if sample[1] <= longest_s]
        on, seconds, uncached = (np.array(column, dtype=np.float64) for column in zip(*usual, strict=True))
        known = np.stack([np.ones_like(on), uncached, on], axis=1)
        fitted, *_ = np.linalg.lstsq(known, seconds, rcond=None)
        variance = ((seconds - known @ fitted) ** 2).sum() / (len(seconds) - 3)
        error_s = float(np.sqrt(variance * np.linalg.inv(known.T @ known)[2, 2]))
        off_s = float(fitted[0] + fitted[1] * uncached.mean())
        on_s = off_s + float(fitted[2])
        return off_s / on_s, error_s * off_s / on_s**2
