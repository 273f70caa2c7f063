"""What a MoE block adds to the state besides its routed experts (shared experts), before those are known.

Nothing here knows a family: the block's own forward is run with its experts answering zeros, and what it gives is what
it adds. Whether the layer's output is the state plus what the block gives is checked once, on a traced call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from offmoe.models.call_trace import Call, LayerTrace, tensors_in
from offmoe.models.predictor import Side, Tail, find_tail
from offmoe.models.stand_ins import stand_in

_NOT_CALLABLE = (RuntimeError, TypeError, ValueError, IndexError, AttributeError, AssertionError)
# Of the largest number in a layer's output: how far the state plus the block's answer may be from it (rounding).
_TOLERANCE = 1e-2


@dataclass(frozen=True, slots=True)
class SharedPart:
    """Of one layer. `tail` leads from the state after attention to the block that calls the experts."""

    tail: Tail
    side: Side

    @torch.no_grad()
    def added(self, state_TX: torch.Tensor) -> torch.Tensor | None:
        """(T, *X) state -> the state with what the block adds to it besides its experts; None where it cannot be asked.

        It costs what the block costs without experts: hidden only while something else is waited for.
        """
        answer = _without_experts(self.tail, self.side, state_TX)
        return None if answer is None else state_TX + answer


def find_shared_part(trace: LayerTrace, experts_call: Call, side: Side) -> SharedPart | None:
    """None where the block adds nothing but its experts, or the layer is not the state plus its block."""
    blocks = [call for call in trace.calls[1:] if call.encloses(experts_call)]
    tail = find_tail(trace, blocks[-1], None, experts_call.module) if blocks else None
    if tail is None or tail.steps[-1].side_names:
        return None
    first, block = tail.steps[0], blocks[-1].module
    if any(first.module is module for module in block.modules()):  # its hooks would take this for a call of the layer
        return None
    state_TX = trace.call_of(first.module).arguments()[first.state_name].reshape(trace.num_tokens, *first.form.rest)
    block_TX, layer_TX = (_first_like(call.output, state_TX) for call in (blocks[-1], trace.layer))
    try:
        shared_TX = _without_experts(tail, side, state_TX)
    except _NOT_CALLABLE:
        return None
    if shared_TX is None or block_TX is None or layer_TX is None or not bool(shared_TX.any()):
        return None
    missed = (state_TX + block_TX - layer_TX).abs().max()
    return SharedPart(tail, side) if bool(missed <= _TOLERANCE * layer_TX.abs().max()) else None


@torch.no_grad()
def _without_experts(tail: Tail, side: Side, state_TX: torch.Tensor) -> torch.Tensor | None:
    def zeros(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros_like(hidden)

    # The block's own code: native code would go to the experts' executor.
    with stand_in({tail.experts: zeros, tail.steps[-1].module: None}) as may_ask:
        answer = tail.answer(state_TX, side) if may_ask else None
    return None if answer is None else _first_like(answer, state_TX)


def _first_like(answer: Any, state_TX: torch.Tensor) -> torch.Tensor | None:
    """The first tensor of as many numbers, in the state's shape and type."""
    found = next((tensor for tensor in tensors_in(answer) if tensor.numel() == state_TX.numel()), None)
    return None if found is None else found.reshape(state_TX.shape).to(state_TX.dtype)
