"""Which tails could end a traced layer, and whether one gives the ids that the layer used (see routers/routing.py).

Shapes: T tokens, K experts a token, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from offmoe.hf.call_trace import LayerTrace, TracedCall, find_tensor, tensors_in
from offmoe.routers.predictor import Form, Side, Tail

# What a module may raise when it is called on a state of another kind than it was made for.
_NOT_CALLABLE = (RuntimeError, TypeError, ValueError, IndexError, AttributeError, AssertionError)


def decoder_layer_of(modules: dict[str, nn.Module], experts_name: str) -> nn.Module:
    """The outermost member of a ModuleList that the experts are in; without one, the module right above them."""
    parts = experts_name.split(".")
    for end in range(1, len(parts)):
        if isinstance(modules[".".join(parts[: end - 1])], nn.ModuleList):
            return modules[".".join(parts[:end])]
    return modules[".".join(parts[:-1])]


def candidates(
    trace: LayerTrace, experts_call: TracedCall, used_ids: torch.Tensor
) -> Iterator[tuple[TracedCall, int | None]]:
    """Calls that may end the tail: modules that answer with the ids, then the block that calls the experts."""
    for call in trace.producers(used_ids, experts_call):
        yield call, find_tensor(call.output, used_ids)
    enclosing = [call for call in trace.calls[1:] if call.encloses(experts_call)]
    if enclosing:
        yield enclosing[-1], None


def agrees(tail: Tail, trace: LayerTrace, used_ids: torch.Tensor) -> bool:
    """The tail gives the ids that the layer used, and looks at each token for itself: in another order, or alone."""
    everyone = torch.arange(trace.num_tokens, device=used_ids.device)
    backwards = everyone.flip(0)
    try:
        return (
            _same(_ask(tail.expert_ids, tail, trace, everyone), used_ids)
            and _same(_ask(tail.expert_ids, tail, trace, backwards), used_ids[backwards])
            and _ask(tail.expert_ids, tail, trace, everyone[:1]) is not None
        )
    except _NOT_CALLABLE:
        return False


@torch.no_grad()
def _ask(
    question: Callable[[torch.Tensor, Side], torch.Tensor | None], tail: Tail, trace: LayerTrace, tokens: torch.Tensor
) -> torch.Tensor | None:
    """Answer of the tail about some tokens of its own layer's state."""
    first = tail.steps[0]
    state = trace.call_of(first.module).arguments()[first.state_name].reshape(trace.num_tokens, *first.form.rest)
    given = {name: _select(value, tokens, trace.num_tokens) for name, value in trace.layer.arguments().items()}
    side = Side()
    side.see(given)
    return question(state[tokens], side)


def _select(value: Any, tokens: torch.Tensor, num_tokens: int) -> Any:
    form = Form.of(value, num_tokens) if isinstance(value, torch.Tensor) else None
    if form is None:
        return value
    return value[:, tokens] if form.batched else value[tokens]


def _same(answer: torch.Tensor | None, expected: torch.Tensor) -> bool:
    return answer is not None and torch.equal(answer, expected)


def with_scores(tail: Tail, trace: LayerTrace, used_ids: torch.Tensor) -> Tail:
    """The same tail with the tensor by which its router ranks, if it answers with one whose best K are the ids."""
    output = trace.call_of(tail.steps[-1].module).output
    for idx, tensor in enumerate(tensors_in(output)):
        form = Form.of(tensor, trace.num_tokens)
        if tensor.is_floating_point() and form is not None and len(form.rest) == 1 and form.rest[0] > used_ids.shape[1]:
            best = tensor.reshape(trace.num_tokens, -1).topk(used_ids.shape[1]).indices
            if torch.equal(best.sort().values, used_ids.sort().values):
                return replace(tail, scores_idx=idx)
    return tail
