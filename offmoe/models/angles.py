"""Rotary angles of one token from a table of its module's own, made for many positions at once.

The module is ten of torch's operations, a tenth of a millisecond a token when a layer's weights have driven them out of
the processor's caches. Only modules whose angles depend on the position alone have a table, and each part of it is
compared with what the module says at the position that was asked for first.
"""

from __future__ import annotations

import torch
from torch import nn

# Kinds whose frequencies never change: not `dynamic` and `longrope`, which follow the longest position.
_FIXED_KINDS = ("default", "linear", "llama3", "yarn")
_BLOCK = 256

Angles = tuple[torch.Tensor, torch.Tensor]


class AngleTable:
    """(cos, sin) of `rotary`, each (1, 1, W), for one position. `by_name`: it takes positions by their name. `kind`: of
    layers, where the module has angles of their own for each.
    """

    def __init__(self, rotary: nn.Module, *, by_name: bool, kind: str = "") -> None:
        self._rotary, self._by_name, self._kind = rotary, by_name, kind
        rope_type: object = getattr(rotary, "rope_type", None)
        rope_type = rope_type.get(kind) if isinstance(rope_type, dict) else rope_type
        self._is_fixed = rope_type in _FIXED_KINDS
        self._frequencies = f"{kind}_inv_freq" if kind else "inv_freq"
        self._known: tuple[object, ...] = ()
        self._table: Angles | None = None

    def __call__(self, x: torch.Tensor, positions: torch.Tensor) -> Angles:
        """Of `positions`, (1, 1), as the module itself gives them for `x`, of which it sees type and device."""
        rotary = self._rotary
        if not self._is_fixed or rotary._forward_hooks or rotary._forward_pre_hooks or positions.device.type != "cpu":
            return self._ask(x, positions)
        block, at = divmod(int(positions), _BLOCK)
        known = (block, x.dtype, id(getattr(rotary, self._frequencies, None)))
        if known != self._known or self._table is None:
            self._known, self._table = known, None
            own = self._ask(x, positions)
            table = self._ask(x, torch.arange(block * _BLOCK, (block + 1) * _BLOCK, device=positions.device)[None])
            if not all(torch.equal(part[:, at : at + 1], mine) for part, mine in zip(table, own, strict=True)):
                self._is_fixed = False
                return own
            self._table = table
        cos, sin = self._table
        return cos[:, at : at + 1], sin[:, at : at + 1]

    def _ask(self, x: torch.Tensor, positions: torch.Tensor) -> Angles:
        named = {"layer_type": self._kind} if self._kind else {}
        if self._by_name:
            angles: Angles = self._rotary(x, position_ids=positions, **named)
        else:
            angles = self._rotary(x, positions, **named)
        return angles
