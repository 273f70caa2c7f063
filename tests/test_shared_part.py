"""Shared experts' part of a layer's output, known before its routed experts are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engines import PROMPT, QUARTER, leaves_nothing, open_tiny, save_tiny
from families import build

from offmoe.models.routing import map_routing
from offmoe.models.transformers_internals import experts_modules
from offmoe.prefetch.lookahead import Lookahead

WITH_SHARED = ["qwen2_moe", "deepseek_v2", "deepseek_v3", "glm4_moe", "ernie4_5_moe", "hunyuan_v1_moe"]


class Tap:
    """Sees what layers are given and answer with, and the state after attention."""

    is_asleep = False

    def __init__(self) -> None:
        self.states: dict[int, torch.Tensor] = {}

    def observe_state(self, layer_idx: int, state_TX: torch.Tensor) -> None:
        self.states[layer_idx] = state_TX.clone()

    def observe_input(self, layer_idx: int, state_TX: torch.Tensor) -> None:
        """Not looked at."""


@pytest.mark.parametrize("name", WITH_SHARED)
def test_the_part_is_the_layers_output_without_its_experts(name: str) -> None:
    model = build(name, seed=3).eval()
    found, tap, outputs = map_routing(model), Tap(), dict[int, torch.Tensor]()
    assert all(layer.shared is not None for layer in found.layers)
    hooks = [found.install(tap)]
    for layer in found.layers:

        def keep(module: Any, args: Any, output: Any, layer_idx: int = layer.layer_idx) -> None:
            outputs[layer_idx] = (output if isinstance(output, torch.Tensor) else output[0]).clone()

        hooks.append(layer.decoder_layer.register_forward_hook(keep))  # type: ignore[arg-type]
    for _, experts in experts_modules(model):  # a layer without its experts
        hooks.append(experts.register_forward_hook(lambda module, args, output: torch.zeros_like(output)))
    with torch.no_grad():
        model(torch.tensor([PROMPT]))
    for layer in found.layers:
        assert layer.shared is not None
        state_TX = tap.states[layer.layer_idx]
        added_TX = layer.shared.added(state_TX)
        assert added_TX is not None and not torch.equal(added_TX, state_TX)
        torch.testing.assert_close(added_TX, outputs[layer.layer_idx].reshape(state_TX.shape), atol=1e-5, rtol=1e-5)
        assert not any("forward" in vars(module) for module in layer.decoder_layer.modules())
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_blocks_that_add_only_their_experts_have_none(name: str) -> None:
    assert all(layer.shared is None for layer in map_routing(build(name, seed=0).eval()).layers)


@pytest.mark.parametrize("name", ["qwen2_moe", "deepseek_v3"])
def test_an_engine_asks_with_the_shared_part_and_says_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder, asked = save_tiny(tmp_path, name), list[bool]()
    with_shared = Lookahead._with_shared

    def spy(self: Lookahead, layer_idx: int, state_TX: torch.Tensor) -> torch.Tensor:
        found = with_shared(self, layer_idx, state_TX)
        asked.append(found is not state_TX)
        return found

    monkeypatch.setattr(Lookahead, "_with_shared", spy)

    def ids(**options: Any) -> tuple[int, ...]:
        with open_tiny(folder, experts=QUARTER, warm_start=False, **options) as engine:
            return engine.generate(PROMPT, max_new_tokens=16, temperature=0, ignore_end=True).token_ids

    with leaves_nothing():
        expected = ids(prefetch="off")
        assert not asked
        assert ids(prefetch=2) == expected
        assert any(asked)
