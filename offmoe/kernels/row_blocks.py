"""Rows of a prompt computed in blocks, so that a row's bits do not depend on how the prompt was cut.

A product of many rows sums in another order than one of few, and attention over other keys in other portions. So while
a piece of a prompt is read, every product, norm and attention of its rows is done for BLOCK_TOKENS rows at a time,
counted from the begin of the prompt; attention sees the keys from the first to the last that a block may see. A block
then gives the same bits in a long piece, in a short one, and behind rows that were kept. Experts are still given all
rows of a piece at once: their kernels sum each row by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar, Token
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

BLOCK_TOKENS = 64
_PRODUCTS = frozenset({
    torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.Tensor.mm, torch.bmm, torch.Tensor.bmm,
})  # fmt: skip
_active: ContextVar[RowBlocks | None] = ContextVar("offmoe_row_blocks", default=None)


def active_blocks() -> RowBlocks | None:
    """The blocks in whose context this thread is. Modules of ours ask: what is no function of torch is not seen."""
    return None if torch.compiler.is_compiling() else _active.get()


def in_row_blocks(compute: Callable[[torch.Tensor], torch.Tensor], states: torch.Tensor) -> torch.Tensor | None:
    """Result of a module's `compute` in blocks of rows, where the context and `states` ask for that; else None."""
    blocks = active_blocks()
    if blocks is None:
        return None
    if not states.is_contiguous():  # or the rows' layout would decide who computes them
        return compute(states.contiguous())
    return blocks.split(compute, states)


class RowBlocks(TorchFunctionMode):
    """Within: operations on the rows of a piece of `num_tokens`, the first of them at a border of blocks."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self._num_tokens = num_tokens
        self._before: Token[RowBlocks | None] | None = None

    def __enter__(self) -> RowBlocks:
        self._before = _active.set(self)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)  # type: ignore[no-untyped-call]
        if self._before is not None:
            _active.reset(self._before)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """See torch.overrides."""
        given = dict(kwargs or {})
        if func is functional.scaled_dot_product_attention:
            return self._attention(func, *args, **given)
        if self._num_tokens > BLOCK_TOKENS:
            if func is functional.linear:
                states, others = args[0], args[1:]
                result = self.split(lambda rows: func(rows, *others, **given), states)
                return func(*args, **given) if result is None else result
            if func in _PRODUCTS and (parts := self._chunks(func, *args[:2])) is not None:
                return parts
            if func in _PRODUCTS and self._is_of_rows(args[0]):
                return self._by_rows(lambda rows: func(rows, *args[1:], **given), args[0])
        return func(*args, **given)

    def _is_of_rows(self, states: torch.Tensor) -> bool:
        return states.dim() >= 2 and states.shape[-2] == self._num_tokens

    def split(self, compute: Callable[[torch.Tensor], torch.Tensor], states: torch.Tensor) -> torch.Tensor | None:
        """The results of `compute` for blocks of rows of `states`, (..., T, K) or T rows in all; None: no such rows."""
        if self._num_tokens <= BLOCK_TOKENS or states.numel() == 0:
            return None
        if self._is_of_rows(states):
            return self._by_rows(compute, states)
        if states.dim() == 4 and states.shape[1] == self._num_tokens:  # heads of a token side by side
            return torch.cat([compute(states[:, begin : begin + BLOCK_TOKENS]) for begin in self._begins()], dim=1)
        width = states.shape[-1]
        if states.numel() != self._num_tokens * width:
            return None
        flat = self._by_rows(compute, states.reshape(-1, width))
        return flat.reshape(*states.shape[:-1], flat.shape[-1])

    def split_rows(self, tokens: Sequence[int]) -> list[list[int]]:
        """Indices into `tokens`, those of the piece's tokens of one block together."""
        found: dict[int, list[int]] = {}
        for row, token in enumerate(tokens):
            found.setdefault(token // BLOCK_TOKENS, []).append(row)
        return list(found.values())

    def _by_rows(self, compute: Callable[[torch.Tensor], torch.Tensor], states: torch.Tensor) -> torch.Tensor:
        blocks = [compute(states[..., begin : begin + BLOCK_TOKENS, :]) for begin in self._begins()]
        return torch.cat(blocks, dim=-2)

    def _begins(self) -> range:
        return range(0, self._num_tokens, BLOCK_TOKENS)

    def _attention(
        self, func: Callable[..., Any], query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        attn_mask: torch.Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False, **given: Any,
    ) -> Any:  # fmt: skip
        num_rows, num_keys = query.shape[-2], key.shape[-2]
        if num_rows != self._num_tokens or dropout_p or num_keys < num_rows:
            return func(query, key, value, attn_mask, dropout_p, is_causal, **given)
        if attn_mask is None:
            if not is_causal and num_rows > 1:
                return func(query, key, value, attn_mask, dropout_p, is_causal, **given)
            places = torch.arange(num_keys, device=query.device)
            attn_mask = (places[None] <= places[num_keys - num_rows :, None])[None, None]
        return self.attend(lambda *part: func(*part, 0.0, False, **given), query, key, value, attn_mask, rows_dim=-2)

    def attend(
        self, compute: Callable[..., torch.Tensor], query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        mask: torch.Tensor, *, rows_dim: int,
    ) -> torch.Tensor:  # fmt: skip
        """`compute(query, key, value, mask)` for blocks of queries and the keys that they see, (..., rows, width) all.

        `mask` is (..., T, S); results have their rows in `rows_dim`.
        """
        parts = []
        for begin in self._begins():
            rows = slice(begin, begin + BLOCK_TOKENS)
            first, last = _seen(mask[..., rows, :])
            seen = slice(first, last + 1)
            parts.append(compute(query[..., rows, :], key[..., seen, :], value[..., seen, :], mask[..., rows, seen]))
        return torch.cat(parts, dim=rows_dim)

    def _chunks(self, func: Callable[..., Any], left: Any, right: Any) -> torch.Tensor | None:
        """Products (..., chunks, rows, width) of a delta net, which are one for each BLOCK_TOKENS tokens."""
        num = -(-self._num_tokens // BLOCK_TOKENS)
        fits = left.dim() == 5 and isinstance(right, torch.Tensor) and right.dim() == 5
        if num < 2 or not fits or left.shape[2] != num or right.shape[2] != num:
            return None
        return torch.cat([func(left[:, :, idx : idx + 1], right[:, :, idx : idx + 1]) for idx in range(num)], dim=2)


def _seen(mask: torch.Tensor) -> tuple[int, int]:
    """The first and the last key that any row of the mask may see."""
    sees = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    places = sees.reshape(-1, mask.shape[-1]).any(dim=0).nonzero()
    return (int(places[0]), int(places[-1])) if len(places) else (0, mask.shape[-1] - 1)
