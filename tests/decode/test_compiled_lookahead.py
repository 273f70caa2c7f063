"""Lookahead in compiled decode steps: routers are asked about the same states, and nothing else changes.

As in test_compiled.py, captured graphs are run operator by operator: their inputs and side effects are what counts.
"""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import PROMPT, assert_at_rest, open_tiny, save_tiny
from families import build
from torch.multiprocessing.reductions import StorageWeakRef

import offmoe
from offmoe.core.errors import EngineClosedError
from offmoe.decode import compiled
from offmoe.decode.compiled import DecodeCompiler
from offmoe.hf.seam import LayerBinding, define_experts_operators
from offmoe.prefetch.lookahead import RouterGuess
from offmoe.routers.routing import map_routing

NUM_NEW = 24
Graphs = list[torch.fx.GraphModule]


@pytest.fixture(autouse=True)
def _by_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that are not compiled are transformers' own: tokens that the fused step compares are guessed twice."""
    monkeypatch.setenv("OFFMOE_DECODE", "eager")


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    """Steps that are compiled within the test, as captured."""
    graphs: Graphs = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(compiled, "DecodeCompiler", functools.partial(DecodeCompiler, lower=keep))
    return graphs


def ids_of(engine: offmoe.Engine, num_new: int = NUM_NEW) -> tuple[int, ...]:
    given: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "reuse": False}
    return engine.generate(PROMPT, max_new_tokens=num_new, **given).token_ids


def guesses_of(engine: offmoe.Engine) -> tuple[tuple[int, ...], list[RouterGuess]]:
    """A generation, and what was guessed in it from the states of layers before."""
    guesses: list[RouterGuess] = []
    assert engine._parts.serving.ahead is not None
    engine._parts.serving.ahead.lookahead._predictions = guesses.append
    ids = ids_of(engine)
    return ids, [guess for guess in guesses if guess.distance]


def states_in(graph: torch.fx.GraphModule) -> list[object]:
    """What the graph's experts calls are given to show, a call."""
    return [node.args[4] for node in graph.graph.nodes if node.target is torch.ops.offmoe.experts]


@pytest.mark.parametrize(("name", "num_layers"), [("qwen3_moe", 2), ("gpt_oss", 3)])
def test_routers_are_asked_as_in_eager_steps(name: str, num_layers: int, tmp_path: Path, captured: Graphs) -> None:
    save_tiny(tmp_path, name)
    options: dict[str, Any] = {"prefetch": 1, "expert_slots": 5 * num_layers}
    with open_tiny(tmp_path, **options) as engine:
        expected, eager_guesses = guesses_of(engine)
    with open_tiny(tmp_path, **options, compile="on") as engine:
        assert ids_of(engine) == expected
        before = engine.stats()
        got, guesses = guesses_of(engine)
        after = engine.stats()
        assert engine.stats()["compile"] == "on"
        assert_at_rest(engine)
    assert got == expected
    assert len(guesses) == NUM_NEW * (num_layers - 1)
    assert guesses == eager_guesses
    assert after["ahead_used_bytes"] > before["ahead_used_bytes"]
    (graph,) = captured
    assert all(isinstance(state, torch.fx.Node) for state in states_in(graph))
    (outputs,) = graph.graph.output_node().args
    assert isinstance(outputs, tuple)
    assert len(outputs) == 1, "states leave the graph through the operator only"


def test_without_lookahead_nothing_goes_along(tmp_path: Path, captured: Graphs) -> None:
    with open_tiny(save_tiny(tmp_path), compile="on", prefetch="off") as engine:
        ids_of(engine, 3)
        assert engine.stats()["compile"] == "on"
    assert states_in(captured[0]) == [None, None]


def test_layers_whose_state_does_not_arrive_are_counted(
    tmp_path: Path, captured: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LayerBinding, "trace_state", lambda binding, state_TX: None)
    save_tiny(tmp_path)
    with open_tiny(tmp_path, prefetch=1) as engine:
        expected = ids_of(engine, 4)
    with open_tiny(tmp_path, prefetch=1, compile="on") as engine:
        assert ids_of(engine, 4) == expected
        assert engine.stats()["compile"] == "on, 2 layers without lookahead"
        assert_at_rest(engine)


def test_a_closed_engine_is_told_nothing_and_not_kept(tmp_path: Path, captured: Graphs) -> None:
    engine = open_tiny(save_tiny(tmp_path), compile="on", prefetch=1)
    ids_of(engine, 4)
    binding = next(module._offmoe_binding for module in engine.model.modules() if hasattr(module, "_offmoe_binding"))
    assert binding.observer is not None
    assert not hasattr(binding, "_traced_state_TX")
    told: list[object] = []
    binding.observer.observe_state = lambda layer_idx, state_TX: told.append(layer_idx)
    call = (torch.zeros(1, 48), torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2), binding.handle)
    define_experts_operators()
    experts = torch.ops.offmoe.experts
    experts(*call, torch.zeros(1, 48))
    experts(*call)
    assert told == [0]
    model, ahead = weakref.ref(engine.model), weakref.ref(binding.observer)
    engine.close()
    with pytest.raises(EngineClosedError, match="closed"):
        experts(*call, torch.zeros(1, 48))
    assert told == [0]
    captured.clear()
    del engine, binding
    gc.collect()
    assert model() is None
    assert ahead() is None


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v4"])
def test_guesses_keep_no_state(name: str) -> None:
    """Not even until the next collection: in a compiled step on CUDA the state's memory is used again at once."""
    found = map_routing(build(name))
    gc.disable()
    try:
        for predictor in filter(None, found.predictors):
            state_TX = torch.randn(1, *predictor.tail.steps[0].form.rest)
            storage = StorageWeakRef(state_TX.untyped_storage())
            ids_TK = predictor(state_TX)
            assert ids_TK is not None or predictor.tail.steps[-1].side_names
            del state_TX
            assert storage.expired()
    finally:
        gc.enable()
