"""Prompts that were read, kept in RAM: rows of keys and values in blocks of tokens, found by what they follow.

A block's name is a hash of its tokens and of the name of the block before it; the first one's begins with the model,
its settings and the caller's namespace. So prompts that begin alike share blocks, and a name says all that a row
depends on. The last block of a prompt also has the states of windows and running states, where the model has any.

Blocks are forgotten, the least recently used first, so that all of them stay within their share of memory. Of one
prompt the last block goes first.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from offmoe.kv.cache import Buffers
from offmoe.kv.states import KeptStates, num_bytes

Name = bytes


@dataclass
class KeptBlock:
    """Rows of one block in every layer of full attention, and the `states` behind it, where they were kept."""

    parent: Name
    rows: list[Buffers]
    states: KeptStates | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of all."""
        return num_bytes(self.rows) + num_bytes(self.states)


def block_names(root: Name, ids: Sequence[int], block_tokens: int) -> list[Name]:
    """Names of the whole blocks of `ids`."""
    names, before = [], root
    for begin in range(0, len(ids) - block_tokens + 1, block_tokens):
        tokens = array("q", ids[begin : begin + block_tokens]).tobytes()
        before = hashlib.blake2b(before + tokens, digest_size=32).digest()
        names.append(before)
    return names


class KeptBlocks:
    """Blocks by name, of at most `budget_bytes`. `num_evicted` blocks had to go."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.used_bytes = self.num_evicted = 0
        self._blocks: OrderedDict[Name, KeptBlock] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, name: Name) -> bool:
        return name in self._blocks

    def __getitem__(self, name: Name) -> KeptBlock:
        return self._blocks[name]

    def longest(self, names: Sequence[Name], *, with_states: bool) -> int:
        """The number of the first blocks of `names` that can be gone on from; they count as used now."""
        there = next((idx for idx, name in enumerate(names) if name not in self._blocks), len(names))
        if with_states:
            there = next((num for num in range(there, 0, -1) if self._blocks[names[num - 1]].states is not None), 0)
        self.touch(names[:there])
        return there

    def touch(self, names: Sequence[Name]) -> None:
        """Used now; the first block of a prompt last, so that it outlives those behind it."""
        for name in reversed(names):
            if name in self._blocks:
                self._blocks.move_to_end(name)

    def room_for(self, num_bytes: int) -> bool:
        """Forget the least recently used blocks until there is room. False where there is none at all."""
        if num_bytes > self.budget_bytes:
            return False
        while self.used_bytes + num_bytes > self.budget_bytes:
            _, block = self._blocks.popitem(last=False)
            self.used_bytes -= block.num_bytes
            self.num_evicted += 1
        return True

    def put(self, name: Name, block: KeptBlock) -> None:
        """Keep a block, for which `room_for` said True."""
        assert name not in self._blocks
        self._blocks[name] = block
        self.used_bytes += block.num_bytes

    def put_states(self, name: Name, states: KeptStates) -> None:
        """Keep the states behind a block that is here, where there is room."""
        block = self._blocks.get(name)
        if block is None or block.states is not None:
            return
        self._blocks.move_to_end(name)
        needed = num_bytes(states)
        if self.used_bytes + needed <= self.budget_bytes or (self.room_for(needed) and name in self._blocks):
            block.states = states
            self.used_bytes += needed

    def clear(self) -> None:
        """Forget all."""
        self._blocks.clear()
        self.used_bytes = 0

    def check_integrity(self) -> None:
        """Raise AssertionError where the sum of bytes is wrong, or above the budget."""
        assert self.used_bytes == sum(block.num_bytes for block in self._blocks.values()), f"{self.used_bytes=}"
        assert self.used_bytes <= self.budget_bytes, f"{self.used_bytes=} {self.budget_bytes=}"
