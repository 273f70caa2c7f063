"""The keeper of prompts that were read: blocks in RAM and, where a folder is given, on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from offmoe.hf.door import DynamicCache
from offmoe.kv.kept_blocks import KeptBlock, KeptBlocks, Name, block_names
from offmoe.kv.states import KeptStates, full_layers, put_rows, put_states, take_rows

if TYPE_CHECKING:
    from offmoe.kv.kept_files import KeptFiles


class PromptKeeper:
    """Keeps prompts in blocks of `block_tokens`. `identity` says what their rows depend on beside the tokens.

    For the thread that runs the model. `num_hits` are tokens that were given back.
    """

    def __init__(
        self, *, budget_bytes: int, block_tokens: int, identity: str, files: KeptFiles | None = None
    ) -> None:  # fmt: skip
        self.blocks, self.files = KeptBlocks(budget_bytes), files
        self.block_tokens = block_tokens
        self._identity = identity
        self.num_hits = 0

    def root(self, namespace: str | None) -> Name:
        """The name before the first block of a prompt in `namespace`; None: without one."""
        salt = "" if namespace is None else f"={namespace}"
        return hashlib.blake2b(f"{self._identity}\n{salt}".encode(errors="surrogatepass"), digest_size=32).digest()

    def find(self, ids: Sequence[int], root: Name, *, with_states: bool) -> int:
        """Tokens of `ids` that are kept, from the first on."""
        names = block_names(root, ids, self.block_tokens)
        found = self.blocks.longest(names, with_states=with_states)
        if self.files is not None and found < len(names):
            found = max(found, self.files.longest(names, with_states=with_states))
        return found * self.block_tokens

    def keep(self, cache: DynamicCache, ids: Sequence[int], root: Name, states: KeptStates | None) -> None:
        """Copy the rows of `ids`, whole blocks, and the `states` behind them, as far as there is room."""
        names = block_names(root, ids, self.block_tokens)
        before = root
        self.blocks.touch(names)
        for idx, name in enumerate(names):
            if name not in self.blocks:
                begin = idx * self.block_tokens
                needed = self._row_bytes(cache)
                # Room is made by forgetting others, not what this prompt begins with.
                if not self.blocks.room_for(needed) or (idx and before not in self.blocks):
                    break
                rows = take_rows(cache, begin, begin + self.block_tokens)
                self.blocks.put(name, KeptBlock(before, rows))
            before = name
        if states is not None and names:
            self.blocks.put_states(names[-1], states)
        self.blocks.touch(names)
        if self.files is not None:
            self.files.write(names, self.blocks)

    def restore(
        self, cache: DynamicCache, ids: Sequence[int], root: Name, *, begin: int, device: torch.device
    ) -> tuple[int, KeptStates | None]:  # fmt: skip
        """Write the rows of `ids`, whole blocks, behind the first `begin` tokens into `cache`, and the states.

        Returns how many tokens it holds then, and the states.
        """
        names = block_names(root, ids, self.block_tokens)
        first = begin // self.block_tokens
        if self.files is not None:
            self.files.read(names, root, self.blocks)
        there = next((idx for idx, name in enumerate(names) if name not in self.blocks), len(names))
        for idx in range(first, there):
            put_rows(cache, idx * self.block_tokens, self.blocks[names[idx]].rows, device=device)
        there = max(there, first)
        states = self.blocks[names[there - 1]].states if there and names[there - 1] in self.blocks else None
        if states is not None:
            put_states(cache, there * self.block_tokens, states, device=device)
        self.num_hits += there * self.block_tokens
        return there * self.block_tokens, states

    def _row_bytes(self, cache: DynamicCache) -> int:
        """Bytes of a block's rows."""
        return sum(layer.bytes_at(self.block_tokens) for layer in full_layers(cache))

    def close(self) -> None:
        """Forget what is in RAM; files are written to their end."""
        self.blocks.clear()
        if self.files is not None:
            self.files.close()

    def as_dict(self) -> dict[str, int]:
        """Numbers for `Engine.stats`."""
        found = {
            "blocks": len(self.blocks), "block_tokens": self.block_tokens, "bytes": self.blocks.used_bytes,
            "budget_bytes": self.blocks.budget_bytes, "hit_tokens": self.num_hits, "evicted": self.blocks.num_evicted,
        }  # fmt: skip
        return found if self.files is None else found | self.files.as_dict()
