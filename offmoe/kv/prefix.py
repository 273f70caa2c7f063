"""The KV cache from one call to the next, and the prompts that were read before.

A prompt that begins like an earlier one is read from where it differs. What is reused are rows that were computed for
exactly these ids. Where they have the very bits of a fresh reading too, they are taken unasked: up to the last border
of `grid` tokens, since a fresh reading computes its rows in the same blocks (kernels/row_blocks.py), or at least cuts
its pieces there. Rows behind that border and rows of replies were computed in other company, which rounds differently
in 16 bits: they are taken where the caller asks for the longest common prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from offmoe.hf.door import DynamicCache, PreTrainedModel
from offmoe.hf.lengths import longest_with_same_cos_sin
from offmoe.kernels.row_blocks import RowBlocks
from offmoe.kv.cache import PreallocatedLayer, SlidingLayer
from offmoe.kv.keeper import PromptKeeper
from offmoe.kv.kept_blocks import Name
from offmoe.kv.states import KeptStates, has_states, is_stateless, take_states


class PrefixCache:
    """One KV cache for all calls of an engine, the ids whose states it holds, and the `keeper` of earlier prompts.

    Order of a call: `begin`, then within `guarded` the rest of the prompt; what was appended in all layers is added to
    `ids`, and `piece_read` called. Not for two calls at once. `num_reused` and `num_prefilled` are totals in tokens.
    `turns_at`: the length from which on all angles differ from those of shorter texts, if there is one.
    """

    def __init__(
        self, model: PreTrainedModel, make_cache: Callable[[], DynamicCache | None], *, divisible: bool, grid: int = 0,
        in_blocks: bool = False, keeper: PromptKeeper | None = None,
    ) -> None:  # fmt: skip
        """`divisible`: the model gives the same result when a prompt comes in pieces; otherwise nothing is reused.

        `grid`: tokens from one border to the next, at which rows have the bits of a fresh reading; 0: there is none.
        `in_blocks`: rows are computed in blocks for that.
        """
        self._make_cache, self._device = make_cache, model.device
        self._divisible = divisible and not model.config.is_encoder_decoder
        self._grid = grid if self._divisible else 0
        self._in_blocks, self.keeper = in_blocks and bool(self._grid), keeper if self._grid else None
        # Beyond it all angles change; states of the first tokens are then of one length or the other.
        self._longest = longest_with_same_cos_sin(model)
        self.turns_at = None if self._longest is None else self._longest + 1
        self._num_seen = 0  # tokens that were held at once, since the cache was empty
        self.cache: DynamicCache | None = None
        self.ids: list[int] = []
        self.logits: torch.Tensor | None = None
        self._num_prompt = 0
        self._ends: torch.Tensor | None = None
        # The first so many rows have the bits of a fresh reading; whether those that are read now will, too.
        self._num_exact, self._is_exact = 0, True
        # What layers that overwrite theirs held at the last border.
        self._border: tuple[int, KeptStates] | None = None
        self._root: Name = b""
        self._is_kept = True
        self.num_reused = self.num_prefilled = 0

    def begin(self, ids: Sequence[int], *, reuse: bool | None, root: Name = b"") -> int:
        """Number of `ids` that the cache holds now, the others being dropped from it; it is not settled before.

        `reuse`: True takes the longest common prefix, False nothing, and nothing is kept of it; None what gives the
        bits of a fresh reading. Where all of `ids` were the last prompt, `logits` are what followed it, else None.
        `root` names what else rows depend on, and who may use them.
        """
        self._num_seen = max(self._num_seen, len(self.ids))
        same = self._same_here(ids, reuse, root)
        repeated = same == len(ids) == self._num_prompt and self._ends is not None
        same = same if repeated else min(same, len(ids) - 1)
        if self._is_longer_than_angles(len(ids)):
            same, repeated = 0, False
        kept = 0 if reuse is False or repeated else self._find_kept(ids, root)
        self.keep()
        if kept > same:
            same, repeated = self._restore(ids, root, kept), False
        elif same == 0 or not self._cut(same):
            same, repeated = 0, False
            self._empty()
        if not repeated:
            self._is_exact = same <= self._num_exact and (not self._grid or same % self._grid == 0)
        self._num_exact = min(self._num_exact, same)
        self.ids[:] = ids[:same]
        self._root, self._is_kept = root, reuse is not False
        self.logits = self._ends if repeated else None
        self._num_prompt = len(ids)
        if not repeated:
            self._ends = None
        if self._border is not None and self._border[0] > same:
            self._border = None
        self.num_reused += same
        self.num_prefilled += len(ids) - same
        return same

    def root(self, namespace: str | None) -> Name:
        """The `root` of prompts in a namespace of the caller; None: without one."""
        if self.keeper is not None:
            return self.keeper.root(namespace)
        return b"" if namespace is None else b"=" + namespace.encode(errors="surrogatepass")

    def reading(self, num_tokens: int) -> AbstractContextManager[object]:
        """Context in which a piece of the prompt is read."""
        return RowBlocks(num_tokens) if self._in_blocks and self._is_exact else nullcontext()

    def piece_read(self, size: int, chunk: int) -> None:
        """A piece of `size` tokens of the prompt was read, in pieces of at most `chunk`."""
        length = len(self.ids)
        if not self._grid or (not self._in_blocks and chunk != self._grid):
            self._is_exact = False
        if not self._is_exact:
            return
        border = length // self._grid * self._grid
        self._num_exact = length
        is_new = border > (self._border[0] if self._border else length - size)
        if self.keeper is not None and is_new and self.cache is not None and has_states(self.cache):
            states = take_states(self.cache, border, length)
            self._border = self._border if states is None else (border, states)

    def prompt_ends(self, logits: torch.Tensor) -> None:
        """Keep the logits that followed the prompt, (1, V): a repetition of it starts from there."""
        self._ends = logits.clone()

    def keep(self) -> None:
        """Give the keeper the rows that a later prompt may go on from. They stay here, too."""
        if self.keeper is None or self.cache is None or not self._is_kept or self._is_longer_than_angles(0):
            return
        border, states = self._num_exact // self._grid * self._grid, None
        if has_states(self.cache):
            border, states = self._border or (0, None)
        if border:
            self.keeper.keep(self.cache, self.ids[:border], self._root, states)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Within: tokens are appended. What breaks off one half-way leaves the cache with the whole ones, or empty."""
        try:
            yield
        except GeneratorExit:  # between two tokens
            raise
        except BaseException:
            # A window may have been moved half-way; full attention only ever writes behind what it holds.
            layers = self.cache.layers if self.cache is not None else []
            if not all(isinstance(layer, PreallocatedLayer) for layer in layers) or not self._cut_all_to(len(self.ids)):
                self.forget()
            raise

    def close(self) -> None:
        """Give all memory back; what is to be in files is written to its end."""
        self.forget()
        if self.keeper is not None:
            self.keeper.close()

    def forget(self) -> None:
        """Give the memory of the KV cache back."""
        self.cache = self.logits = self._ends = self._border = None
        self.ids.clear()
        self._num_prompt = self._num_exact = 0

    def _same_here(self, ids: Sequence[int], reuse: bool | None, root: Name) -> int:
        """Tokens of `ids` that the cache holds and that may be used."""
        if not self._divisible or self.cache is None or reuse is False or root != self._root:
            return 0
        if reuse is None and not self._is_kept:
            return 0
        same = self._common(ids)
        if reuse or (same == len(ids) == self._num_prompt and self._num_exact >= same):
            return same
        return min(same, self._num_exact) // self._grid * self._grid if self._grid else 0

    def _find_kept(self, ids: Sequence[int], root: Name) -> int:
        """Tokens of `ids` that the keeper has, at least one being left to read: a layer with a state takes more."""
        if self.keeper is None or self._is_longer_than_angles(len(ids)):
            return 0
        return self.keeper.find(ids[: len(ids) - 1 - self._has_states()], root, with_states=self._has_states())

    def _has_states(self) -> bool:
        if self.cache is None:
            self.cache = self._make_cache()
        return self.cache is not None and has_states(self.cache)

    def _restore(self, ids: Sequence[int], root: Name, length: int) -> int:
        """Hold the first `length` of `ids` from the keeper; returns how many that are: some may be gone by now."""
        assert self.keeper is not None
        there = 0 if self._has_states() else min(self._common(ids), self._num_exact, length) // self._grid * self._grid
        if root != self._root or there == 0 or not self._cut(there):
            there = 0
            self._empty()
        assert self.cache is not None
        found, states = self.keeper.restore(self.cache, ids[:length], root, begin=there, device=self._device)
        if found < length and self._has_states():  # without its states
            self._empty()
            found = 0
        self._num_exact = found
        self._border = None if states is None or not found else (found, states)
        return found

    def _is_longer_than_angles(self, length: int) -> bool:
        return self._longest is not None and max(length, self._num_seen, len(self.ids)) > self._longest

    def _common(self, ids: Sequence[int]) -> int:
        pairs = zip(self.ids, ids, strict=False)
        return next((i for i, (held, new) in enumerate(pairs) if held != new), min(len(self.ids), len(ids)))

    def _cut(self, length: int) -> bool:
        """Hold `length` tokens; False, and nothing is changed, where a layer cannot go back that far."""
        return length == len(self.ids) or self._cut_all_to(length)

    @torch.inference_mode()
    def _cut_all_to(self, length: int) -> bool:
        layers: list[Any] = [] if self.cache is None else list(self.cache.layers)
        if length == 0 or not layers or not all(_reaches(layer, length) for layer in layers):
            return False
        for layer in layers:
            if not is_stateless(layer):
                layer.grow_to(length)
        return True

    @torch.inference_mode()
    def _empty(self) -> None:
        """The buffers stay where all layers are ours: others may not know how to begin again."""
        layers: list[Any] = [] if self.cache is None else list(self.cache.layers)
        if layers and all(isinstance(layer, (PreallocatedLayer, SlidingLayer)) for layer in layers):
            for layer in layers:
                layer.reset()
        else:
            self.cache = None
            self.cache = self._make_cache()
        self.ids.clear()
        self._num_seen = self._num_exact = 0
        self._border = None


def _reaches(layer: Any, length: int) -> bool:
    """The states of the first `length` tokens, as far back as the next one sees, are still in `layer`."""
    if isinstance(layer, PreallocatedLayer):
        return layer.buffers is not None
    if isinstance(layer, SlidingLayer):
        first = max(0, length - layer.sliding_window + 1)
        return layer.buffers is not None and not layer.record_past and layer.offset <= first
    return is_stateless(layer)
