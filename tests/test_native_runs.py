"""A token's layers in as few calls of the kernels as can be: the same bits and the same books as layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engines import PROMPT, assert_at_rest, open_tiny, save_tiny
from families import build, save_layout
from test_native_layers import logits, steps
from torch import nn

import offmoe
from offmoe.base.trace import TraceEvent
from offmoe.kernels.cpu.loader import usable_levels
from offmoe.models.native_hooks import mark_observer
from offmoe.models.native_model import DecoderStep, _is_plain
from offmoe.models.native_run import LayerRun

pytestmark = pytest.mark.skipif(not usable_levels(), reason="the CPU kernels were not built")

NUM_NEW = 12


class Calls:
    """Counts the calls of the library that compute layers: `runs` several, `single` one."""

    def __init__(self, engine: offmoe.Engine) -> None:
        self.runs = self.single = 0
        self._kernels = engine._parts.native.kernels
        self._kernels.run_layers, self._kernels.run_layer = self._run, self._layer

    def _run(self, address: int) -> int:
        self.runs += 1
        return type(self._kernels).run_layers(self._kernels, address)

    def _layer(self, address: int) -> None:
        self.single += 1
        type(self._kernels).run_layer(self._kernels, address)


def decoder(engine: offmoe.Engine) -> DecoderStep:
    (found,) = steps(engine, DecoderStep)
    return found


def put_back(engine: offmoe.Engine) -> None:
    """Each layer by itself from now on."""
    engine._parts.native.put_back(decoder(engine).module, "decoders")


def books(engine: offmoe.Engine) -> tuple[dict[str, Any], list[TraceEvent], Any]:
    """What must not depend on how layers were computed."""
    counts = engine._parts.cache.counters.as_dict()
    return (
        {name: count for name, count in counts.items() if not name.endswith("_ns")},
        engine.recent_routing(),
        engine._parts.cache.policy.drain(),
    )


def told_both_ways(folder: Path, **options: Any) -> tuple[int, int]:
    """Compares logits and books, and returns the calls of runs, and of single layers beside them, of `NUM_NEW`
    tokens.
    """
    found = []
    for joined in (True, False):
        with open_tiny(folder, **{"compile": "off", "prefetch": "off", **options}) as engine:
            if not joined:
                put_back(engine)
            before = logits(engine, NUM_NEW)
            calls = Calls(engine)
            rows = torch.cat([before, logits(engine, NUM_NEW)])
            assert_at_rest(engine)
            found.append((rows, books(engine), calls))
    (rows, told, calls), (other_rows, other_told, other_calls) = found
    assert torch.equal(rows, other_rows)
    assert told == other_told
    assert other_calls.runs == 0
    return calls.runs, calls.single


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "glm4_moe", "gpt_oss"])
@pytest.mark.parametrize("experts", [24, 9, 4])
def test_logits_and_books_are_those_of_single_layers(name: str, experts: int, tmp_path: Path) -> None:
    runs, single = told_both_ways(save_tiny(tmp_path, name), experts=experts)
    assert runs >= NUM_NEW - 1  # a token is one call, and one more for each layer that lacks an expert
    assert single == 0
    assert (runs == NUM_NEW - 1) == (experts == 24)


@pytest.mark.parametrize("policy", ["lru", "lfru", "decayed", "s3fifo", "static"])
def test_every_policy_is_told_the_same(policy: str, tmp_path: Path) -> None:
    told_both_ways(save_tiny(tmp_path), experts=5, policy=policy)


def test_windows_slide_within_a_run(tmp_path: Path) -> None:
    """More tokens than the window holds twice: rows move in their buffers."""
    save_layout(build("mixtral", overrides={"sliding_window": 9}), tmp_path, "published")
    runs, single = told_both_ways(tmp_path, experts=24)
    assert (runs, single) == (NUM_NEW - 1, 0)


def test_a_trace_is_the_same(tmp_path: Path) -> None:
    folder, files = save_tiny(tmp_path / "model"), [tmp_path / "joined", tmp_path / "single"]
    for file in files:
        with open_tiny(folder, compile="off", prefetch="off", experts=7) as engine:
            if file.name == "single":
                put_back(engine)
            logits(engine, 4)
            with engine.trace(file, guesses=True):
                logits(engine, NUM_NEW)
    joined, single = (file.read_bytes().split(b"\n")[1:] for file in files)
    assert joined == single


@pytest.fixture
def engine(tmp_path: Path) -> Any:
    """All experts in RAM, and everything compared."""
    with open_tiny(save_tiny(tmp_path), experts=16, compile="off") as opened:
        logits(opened)
        yield opened


def runs_of(engine: offmoe.Engine, num_new: int = 4) -> int:
    """Calls of runs in so many tokens, the first of them the prompt's."""
    calls = Calls(engine)
    logits(engine, num_new)
    return calls.runs


@pytest.mark.parametrize("name", ["model.layers.1", "model.layers.1.self_attn", "model.layers.2.mlp.experts"])
def test_hooks_within_are_run(engine: offmoe.Engine, name: str) -> None:
    seen: list[int] = []
    handle = engine.model.get_submodule(name).register_forward_hook(lambda *_: seen.append(1))
    assert runs_of(engine) == 0
    assert len(seen) == 4
    handle.remove()
    assert runs_of(engine) == 3


def test_who_can_be_told_is_told_in_order(engine: offmoe.Engine) -> None:
    seen: list[tuple[str, torch.Tensor]] = []
    names = ["model.layers.0", "model.layers.0.mlp.gate", "model.layers.2", "model.layers.2.mlp.gate"]

    def watch(name: str) -> None:
        def tell(state: torch.Tensor) -> None:
            seen.append((name, state.reshape(-1).clone()))

        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            if args[0].numel() == args[0].shape[-1]:
                tell(args[0])

        mark_observer(hook, tell)
        engine.model.get_submodule(name).register_forward_pre_hook(hook)

    for name in names:
        watch(name)
    assert runs_of(engine) == 3
    passing = seen.copy()
    seen.clear()
    put_back(engine)
    assert runs_of(engine) == 0
    assert [name for name, _ in passing] == names * 3
    for one, other in zip(passing, seen, strict=True):
        assert one[0] == other[0]
        assert torch.equal(one[1], other[1])


def test_layers_are_joined_while_the_lookahead_sleeps(tmp_path: Path) -> None:
    """It has hooks on layers and norms all the time; awake it must be told before the next layer runs."""
    with open_tiny(save_tiny(tmp_path), experts=9, compile="off", prefetch="auto") as engine:
        logits(engine, 4)
        ahead = engine._parts.serving.ahead
        assert ahead is not None
        (run,) = decoder(engine)._current_parts()
        assert isinstance(run, LayerRun)
        for is_asleep in (True, False):
            ahead.lookahead.is_asleep = is_asleep
            assert (run._ready() is not None) == is_asleep


def test_an_executor_that_is_lent_computes(engine: offmoe.Engine) -> None:
    cached = logits(engine, 4)
    with engine.uncached():
        calls = Calls(engine)
        assert torch.equal(logits(engine, 4), cached)
        assert calls.runs == 0
    logits(engine, 4)  # the first layers' experts are seen again
    assert runs_of(engine) == 3
    assert torch.equal(logits(engine, 4), cached)


def test_layers_that_were_put_back_run_their_own_code(engine: offmoe.Engine) -> None:
    expected, (run,) = logits(engine, 4), [part for part in decoder(engine)._parts if isinstance(part, LayerRun)]
    assert len(run.steps) == 3
    engine._parts.native.put_back(run.steps[1].layer, "layers")
    calls = Calls(engine)
    assert torch.equal(logits(engine, 4), expected)
    assert calls.runs == 2 * 3  # before and after it
    assert calls.single == 0


def test_steps_of_another_kind_run_the_decoders_own_code(engine: offmoe.Engine) -> None:
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        plain = engine.model(input_ids=ids[:, :1]).logits
        more = engine.model(input_ids=ids[:, :1], output_hidden_states=True, return_dict=True)
        given = engine.model(inputs_embeds=engine.model.get_input_embeddings()(ids[:, :1])).logits
    assert len(more.hidden_states) == 4
    torch.testing.assert_close(plain, more.logits)
    torch.testing.assert_close(plain, given)
    assert runs_of(engine) == 0  # transformers' hooks stay where they are


def test_an_interrupt_leaves_the_cache_at_rest(engine: offmoe.Engine) -> None:
    expected, kernels = logits(engine, 4), engine._parts.native.kernels

    def interrupted(address: int) -> int:
        type(kernels).run_layers(kernels, address)
        raise KeyboardInterrupt

    kernels.run_layers = interrupted
    with pytest.raises(KeyboardInterrupt):
        logits(engine, 4)
    del kernels.run_layers
    assert_at_rest(engine)
    assert torch.equal(logits(engine, 4), expected)


def test_decoders_that_do_more_are_left_alone() -> None:
    class Common(nn.Module):
        def forward(self, input_ids: Any, position_ids: Any, **kwargs: Any) -> Any:
            hidden_states = self.embed_tokens(input_ids)
            angles = self.rotary_emb(hidden_states, position_ids)
            for layer in self.layers[:3]:
                hidden_states = layer(hidden_states, position_embeddings=angles, **kwargs)
            return self.norm(hidden_states)

    class Scaled(Common):
        def forward(self, input_ids: Any, position_ids: Any, **kwargs: Any) -> Any:
            hidden_states = self.embed_tokens(input_ids) * 2
            for layer in self.layers:
                hidden_states = layer(hidden_states, **kwargs)
            return self.norm(hidden_states)

    class Mixing(Common):
        def forward(self, input_ids: Any, position_ids: Any, **kwargs: Any) -> Any:
            hidden_states = self.embed_tokens(input_ids)
            for layer in self.layers:
                hidden_states = torch.lerp(hidden_states, layer(hidden_states, **kwargs), 0.5)
            return self.norm(hidden_states)

    assert _is_plain(Common)
    assert not _is_plain(Scaled)
    assert not _is_plain(Mixing)
