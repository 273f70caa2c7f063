"""Decoder layers and MoE blocks computed whole by the CPU kernels: which ones, when not, and that no id changes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import PROMPT, open_tiny, plain_model, save_tiny
from torch import nn

import offmoe
from offmoe.kernels.cpu.loader import load_cpu_kernels, usable_levels
from offmoe.models.native_hooks import mark_observer
from offmoe.models.native_layer import LayerStep, _is_plain
from offmoe.models.native_model import DecoderStep
from offmoe.models.native_moe import MoeStep, _Call, _find_route, _Router

NUM_NEW = 10

pytestmark = pytest.mark.skipif(not usable_levels(), reason="the CPU kernels were not built")

# name -> (decoder layers, MoE blocks) that are still swapped after some tokens. Each model has three layers.
FAMILIES = {
    "qwen3_moe": (3, 2),
    "mixtral": (3, 3),
    "qwen2_moe": (3, 2),  # a shared expert behind a gate
    "glm4_moe": (3, 2),  # groups, a correction, shared experts
    "exaone_moe": (1, 2),  # attention keeps its own code in two layers, and with it the layer
    "deepseek_v3": (0, 2),  # another kind of attention
    "gpt_oss": (3, 3),  # sinks, windows, biases; the block answers with its weights, too
}


@pytest.mark.parametrize("name", FAMILIES)
def test_ids_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, name)
    with open_tiny(folder, compile="off") as engine:
        ids = engine.generate(PROMPT, max_new_tokens=NUM_NEW, temperature=0, ignore_end=True).token_ids
        counts = engine._parts.native.counts
        assert (counts["layers"], counts["moe blocks"]) == FAMILIES[name]
        # A second time, with everything compared by now, to the bit the same.
        assert torch.equal(logits(engine), logits(engine))
    with torch.inference_mode():
        expected = plain_model(folder).generate(
            torch.tensor([PROMPT]), max_new_tokens=NUM_NEW, do_sample=False, eos_token_id=None
        )
    assert list(ids) == expected[0, len(PROMPT) :].tolist()


def logits(engine: offmoe.Engine, num_new: int = NUM_NEW) -> torch.Tensor:
    """Of every greedy step, (N, V)."""
    rows: list[torch.Tensor] = []

    def choose(_: torch.Tensor, last: torch.Tensor) -> int:
        rows.append(last.clone())
        return int(last.argmax())

    engine.generate(PROMPT, max_new_tokens=num_new, choose=choose, ignore_end=True)
    return torch.cat(rows)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[offmoe.Engine]:
    """All experts in RAM, and everything compared; layers are computed one by one."""
    with open_tiny(save_tiny(tmp_path), experts=16, compile="off") as opened:
        for step in steps(opened, DecoderStep):
            opened._parts.native.put_back(step.module, "decoders")
        logits(opened)
        yield opened


def steps(engine: offmoe.Engine, kind: type[Any]) -> list[Any]:
    found = [getattr(vars(module).get("forward"), "__self__", None) for module in engine.model.modules()]
    return [step for step in found if isinstance(step, kind)]


def whole_layers(engine: offmoe.Engine) -> int:
    """Layers that four tokens, the first of them the prompt's, ran whole."""
    calls = []
    kernels = engine._parts.native.kernels
    kernels.run_layer = lambda address: (calls.append(address), type(kernels).run_layer(kernels, address))
    try:
        logits(engine, 4)
    finally:
        del kernels.run_layer
    return len(calls)


def test_all_layers_of_a_token_run_whole(engine: offmoe.Engine) -> None:
    assert whole_layers(engine) == 3 * 3


def test_the_bits_are_those_of_the_modules(engine: offmoe.Engine) -> None:
    """Except for the router's rule, which the block's own step computes as the layer's does."""
    whole = logits(engine)
    for step in steps(engine, LayerStep):
        engine._parts.native.put_back(step.layer, "layers")
    assert whole_layers(engine) == 0
    assert torch.equal(whole, logits(engine))
    for step in steps(engine, MoeStep):
        engine._parts.native.put_back(step.block, "moe blocks")
    torch.testing.assert_close(whole, logits(engine))


@pytest.mark.parametrize("name", ["self_attn.q_proj", "post_attention_layernorm", "mlp", "mlp.gate", "mlp.experts"])
@pytest.mark.parametrize("before", [False, True])
def test_hooks_inside_a_layer_are_run(engine: offmoe.Engine, name: str, before: bool) -> None:
    module, seen = engine.model.get_submodule(f"model.layers.2.{name}"), []
    register = module.register_forward_pre_hook if before else module.register_forward_hook
    handle = register(lambda *_: seen.append(1))
    assert whole_layers(engine) == 2 * 3  # the other layers
    assert len(seen) == 4
    handle.remove()
    assert whole_layers(engine) == 3 * 3


@pytest.mark.parametrize("name", ["post_attention_layernorm", "mlp", "mlp.gate"])
def test_who_can_be_told_is_told_in_passing(engine: offmoe.Engine, name: str) -> None:
    seen: list[torch.Tensor] = []

    def tell(state: torch.Tensor) -> None:
        seen.append(state.reshape(-1).clone())

    def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if args[0].numel() == args[0].shape[-1]:
            tell(args[0])

    mark_observer(hook, tell)
    engine.model.get_submodule(f"model.layers.2.{name}").register_forward_pre_hook(hook)
    assert whole_layers(engine) == 3 * 3
    passing = seen.copy()
    seen.clear()
    for step in steps(engine, LayerStep):
        engine._parts.native.put_back(step.layer, "layers")
    assert whole_layers(engine) == 0
    assert len(passing) == len(seen) == 3
    assert all(torch.equal(one, other) for one, other in zip(passing, seen, strict=True))


def test_hooks_of_every_module_are_run(engine: offmoe.Engine) -> None:
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        assert whole_layers(engine) == 0
    finally:
        handle.remove()
    assert seen.count("Qwen3MoeAttention") == 3 * 4


def test_what_is_asked_of_transformers_comes_from_its_own_code(engine: offmoe.Engine) -> None:
    ids = torch.tensor([PROMPT])
    output = engine.model(input_ids=ids, output_hidden_states=True, output_attentions=True, output_router_logits=True)
    assert len(output.hidden_states) == 4
    assert len(output.router_logits) == 2
    assert whole_layers(engine) < 3 * 3  # transformers' hooks stay where they are


def test_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFMOE_CPU_KERNELS", "off")
    with open_tiny(save_tiny(tmp_path), compile="off") as engine:
        assert not steps(engine, LayerStep)
        assert not steps(engine, MoeStep)


def test_layers_that_do_more_are_left_alone() -> None:
    class Common(nn.Module):
        def forward(self, hidden_states: Any, **kwargs: Any) -> Any:
            residual = hidden_states
            hidden_states, _ = self.self_attn(hidden_states=self.norm(hidden_states), **kwargs)
            return residual + hidden_states

    class Scaled(Common):
        def forward(self, hidden_states: Any, **kwargs: Any) -> Any:
            hidden_states, _ = self.self_attn(hidden_states=self.norm(hidden_states), **kwargs)
            return hidden_states + hidden_states * self.scale

    class Dropping(Common):
        def forward(self, hidden_states: Any, **kwargs: Any) -> Any:
            hidden_states, _ = self.self_attn(hidden_states=self.norm(hidden_states), **kwargs)
            return nn.functional.dropout(hidden_states)

    assert _is_plain(Common)
    assert not _is_plain(Scaled)
    assert not _is_plain(Dropping)


def test_a_rule_that_is_not_known_is_not_taken() -> None:
    kernels, _ = load_cpu_kernels()
    assert kernels is not None
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    router = _Router(module=nn.Module(), weight_ED=weight, by_expert=[], settings={})

    def call(rows: torch.Tensor, power: float) -> Any:
        weights, ids = (rows @ weight.T).softmax(-1).topk(2)
        return _Call(x_TD=rows, ids_TK=ids, weights_TK=weights**power, answer_TD=rows, output_TD=rows)

    rows = torch.randn(6, 1, 16, generator=torch.Generator().manual_seed(1))
    assert _find_route(kernels, router, [call(row, 1.0) for row in rows]) is not None
    assert _find_route(kernels, router, [call(row, 2.0) for row in rows]) is None
