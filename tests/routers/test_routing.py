"""Every family's routing is found from one short forward, and asking it changes nothing.

Shapes: B sequences, S tokens each, T = B * S, K experts a token.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import open_tiny, save_tiny
from families import FAMILIES, MULTIMODAL, build
from torch import nn
from transformers import PreTrainedModel
from transformers.models.jamba import modeling_jamba

from offmoe.hf.call_trace import LayerTrace, TracedCall
from offmoe.hf.internals import SEAM_NAME, experts_modules
from offmoe.hf.seam import LayerBinding, bind
from offmoe.routers import routing
from offmoe.routers.predictor import ids_given_to_experts
from offmoe.routers.routing import NOT_FOUND, NOT_REACHED, RoutingMap, map_routing

ALL = (*FAMILIES, *MULTIMODAL)
# Experts of pictures: no text comes to them.
UNREACHED = {"ernie4_5_vl_moe": {1, 3}, "dots3_note_multimodal": {2}}
# In older transformers its router is a linear layer alone, and the block chooses.
WITHOUT_ROUTER = () if hasattr(modeling_jamba, "JambaTopKRouter") else ("jamba",)
# The decoder layer is the block: running it would run its attention.
NO_BLOCK = {"gemma4", "gemma4_multimodal"}
# The router adds the router state of the layer before, which has not run yet; the layer before that had none.
BLIND = {("zaya", 1)}


class Watcher:
    """Asks, when a layer's state is seen, that layer and the next; keeps what was answered and what was really used."""

    is_asleep = False

    def __init__(self, model: PreTrainedModel, found: RoutingMap) -> None:
        self.model, self.found = model, found
        self.inputs: list[int] = []
        self.own: dict[int, torch.Tensor | None] = {}
        self.ahead: dict[int, torch.Tensor | None] = {}
        self.used: dict[int, torch.Tensor] = {}

    def observe_state(self, layer_idx: int, state_TX: torch.Tensor) -> None:
        self.own[layer_idx] = self._ask(layer_idx, state_TX)
        place = self.found.order.index(layer_idx)
        for target_idx in self.found.order[place + 1 : place + 2]:
            self.ahead[target_idx] = self._ask(target_idx, state_TX)

    def observe_input(self, layer_idx: int, state_TX: torch.Tensor) -> None:
        self.inputs.append(layer_idx)
        assert state_TX.dim() >= 2

    def _ask(self, layer_idx: int, state_TX: torch.Tensor) -> torch.Tensor | None:
        predictor = self.found.predictors[layer_idx]
        return None if predictor is None else predictor(state_TX)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within: hooks are on the model, and on its experts to see what they are really given."""
        modules = [module for _, module in experts_modules(self.model)]

        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            ids = ids_given_to_experts(args, kwargs)
            self.used[modules.index(module)] = ids.reshape(-1, ids.shape[-1])

        handles = [module.register_forward_pre_hook(see, with_kwargs=True) for module in modules]
        hooks = self.found.install(self)
        try:
            yield
        finally:
            hooks.remove()
            hooks.remove()
            for handle in handles:
                handle.remove()


def build_bound(name: str, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The family's tiny model, whose experts have no executor: they add zero."""
    model = build(name, dtype=dtype)
    for layer_idx, (_, module) in enumerate(experts_modules(model)):
        bind(module, LayerBinding(layer_idx, 8, model.dtype))
    model.set_experts_implementation(SEAM_NAME)
    return model


def traces_left(model: PreTrainedModel) -> list[tuple[str, object]]:
    """Everything on the model's modules that a hook or a replaced forward would leave."""
    return [
        (name, kept)
        for name, module in model.named_modules()
        for kept in (list(module._forward_hooks), list(module._forward_pre_hooks), "forward" in vars(module))
        if kept
    ]


def fresh_ids(num_sequences: int = 2, num_tokens: int = 7) -> torch.Tensor:
    return torch.randint(3, 100, (num_sequences, num_tokens), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", ALL)
def test_every_layer_is_found_and_predicts_itself(name: str) -> None:
    model = build(name)
    clean = traces_left(model)
    found = map_routing(model)
    assert traces_left(model) == clean
    if name in WITHOUT_ROUTER:
        assert {layer.reason for layer in found.layers} == {NOT_FOUND}
        return
    assert {layer.layer_idx: layer.reason for layer in found.layers if layer.predictor is None} == dict.fromkeys(
        UNREACHED.get(name, ()), NOT_REACHED
    )
    assert [layer.layer_idx for layer in found.layers] == list(range(len(found.layers)))

    ids = fresh_ids()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        clean = traces_left(model)  # transformers puts hooks of its own there
        watcher = Watcher(model, found)
        with watcher.watching():
            got = model(input_ids=ids).logits
        after = model(input_ids=ids).logits
    assert traces_left(model) == clean
    assert torch.equal(got, expected)
    assert torch.equal(after, expected)
    assert tuple(watcher.inputs) == tuple(watcher.own) == tuple(watcher.used) == found.order
    for layer_idx in found.order:
        own = watcher.own[layer_idx]
        assert own is not None
        assert torch.equal(own, watcher.used[layer_idx]), f"{layer_idx=}"
        assert not own.requires_grad
    for layer_idx, ahead in watcher.ahead.items():
        assert (ahead is None) == ((name, layer_idx) in BLIND), f"{layer_idx=}"
        assert ahead is None or ahead.shape == watcher.used[layer_idx].shape


@pytest.mark.parametrize("name", ALL)
def test_the_block_run_up_to_its_experts_predicts_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Routers that answer with scores only, their block choosing: no family's router is a module of use here."""
    candidates = routing.candidates

    def only_the_block(
        trace: LayerTrace, call: TracedCall, used_ids: torch.Tensor
    ) -> Iterator[tuple[TracedCall, int | None]]:
        return (found for found in candidates(trace, call, used_ids) if found[1] is None)

    monkeypatch.setattr(routing, "candidates", only_the_block)
    model = build_bound(name)
    found = map_routing(model)
    if name in NO_BLOCK:
        assert {layer.reason for layer in found.layers} == {NOT_FOUND}
        return
    watcher, ids = Watcher(model, found), fresh_ids()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        with watcher.watching():
            assert torch.equal(model(input_ids=ids).logits, expected)
    assert set(watcher.own) == set(found.order) == set(watcher.used)
    for layer_idx, own in watcher.own.items():
        assert own is not None
        assert torch.equal(own, watcher.used[layer_idx]), f"{layer_idx=}"


@pytest.mark.parametrize("name", ["deepseek_v4", "inkling2", "nemotron_h", "qwen3_moe", "zaya"])
def test_found_in_bfloat16_with_states_kept_in_float32(name: str) -> None:
    model = build(name, dtype=torch.bfloat16)
    found = map_routing(model)
    watcher = Watcher(model, found)
    with torch.no_grad(), watcher.watching():
        model(input_ids=fresh_ids())
    for layer_idx in found.order:
        own = watcher.own[layer_idx]
        assert own is not None
        assert torch.equal(own, watcher.used[layer_idx]), f"{layer_idx=}"


def test_hash_routing_is_known_exactly_whatever_the_state() -> None:
    """The first layer of this family looks experts up by token id; any state gives the ids that will be used."""
    model = build("deepseek_v4")
    found = map_routing(model)
    answers = []

    class Guess(Watcher):
        def observe_input(self, layer_idx: int, state_TX: torch.Tensor) -> None:
            if layer_idx == 0:
                answers.append(self._ask(0, torch.randn(state_TX.shape)))

    watcher = Guess(model, found)
    with torch.no_grad(), watcher.watching():
        model(input_ids=fresh_ids())
    assert torch.equal(answers[0], watcher.used[0])
    predictor = found.predictors[0]
    assert predictor is not None
    assert predictor(torch.randn(14, 2, 48)) is None  # the forward is over, and its token ids with it


def test_a_state_of_another_width_is_not_predicted() -> None:
    predictor = map_routing(build("qwen3_moe")).predictors[0]
    assert predictor is not None
    assert predictor(torch.randn(3, 47)) is None


def test_scores_rank_the_chosen_experts_first() -> None:
    model = build("qwen3_moe")
    predictor = map_routing(model).predictors[0]
    assert predictor is not None
    state_TD = torch.randn(9, 48)
    ids_TK, scores_TE = predictor(state_TD), predictor.scores(state_TD)
    assert ids_TK is not None
    assert scores_TE is not None
    assert scores_TE.shape == (9, 8)
    assert torch.equal(scores_TE.topk(2).indices, ids_TK)
    for factor, num in ((1, 2), (3, 6), (9, 8)):
        ranked = predictor.ranked(state_TD, factor)
        assert ranked is not None
        assert torch.equal(ranked[0], scores_TE.topk(num).indices) and ranked[1] == 2


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v4"])
def test_outputs_that_transformers_collects_do_not_see_predictions(name: str) -> None:
    model = build(name)
    found = map_routing(model)
    with torch.no_grad():
        expected = model(input_ids=fresh_ids(), output_router_logits=True, output_hidden_states=True)
        with Watcher(model, found).watching():
            got = model(input_ids=fresh_ids(), output_router_logits=True, output_hidden_states=True)
    assert len(got.router_logits) == len(expected.router_logits)
    assert all(torch.equal(a, b) for a, b in zip(got.router_logits, expected.router_logits, strict=True))
    assert len(got.hidden_states) == len(expected.hidden_states)


def test_hooks_keep_no_tensor_of_a_forward() -> None:
    model = build("deepseek_v4")
    found = map_routing(model)
    seen: list[weakref.ref[torch.Tensor]] = []

    class Quiet:
        is_asleep = False

        def observe_state(self, layer_idx: int, state_TX: torch.Tensor) -> None:
            seen.append(weakref.ref(state_TX))

        def observe_input(self, layer_idx: int, state_TX: torch.Tensor) -> None:
            seen.append(weakref.ref(state_TX))

    hooks, ids = found.install(Quiet()), fresh_ids()
    seen.append(weakref.ref(ids))
    with torch.no_grad():
        model(input_ids=ids)
    del ids
    gc.collect()
    assert len(seen) == 1 + 2 * len(found.order)
    assert all(reference() is None for reference in seen)
    hooks.remove()


def test_a_compiled_step_is_one_graph_without_the_hooks() -> None:
    model = build("qwen3_moe")
    found = map_routing(model)
    watcher, predictor = Watcher(model, found), found.predictors[0]
    assert predictor is not None
    norm, state_TD = predictor.tail.steps[0].module, torch.randn(3, 48)
    with torch.no_grad(), watcher.watching():
        expected = norm(state_TD)
        assert watcher.own.pop(0) is not None
        compiled = torch.compile(norm, fullgraph=True, backend="eager")
        assert torch.equal(compiled(state_TD), expected)
    assert not watcher.own


def test_on_a_loaded_engine_asking_never_reaches_the_executor(tmp_path: Path) -> None:
    with open_tiny(save_tiny(tmp_path / "tiny", "deepseek_v3")) as engine:
        found = map_routing(engine.model)
        watcher = Watcher(engine.model, found)
        with torch.no_grad():
            expected = engine.model(input_ids=fresh_ids()).logits
            before = engine.stats()["layer_calls"]
            with watcher.watching():
                got = engine.model(input_ids=fresh_ids()).logits
        assert torch.equal(got, expected)
        assert engine.stats()["layer_calls"] - before == len(found.order)
        assert all(torch.equal(own, watcher.used[idx]) for idx, own in watcher.own.items() if own is not None)
        assert None not in watcher.own.values()
