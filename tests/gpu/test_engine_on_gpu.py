"""The whole engine with its experts in device slots: the model's own output, within its budget, whatever is set."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import PROMPT, assert_at_rest, plain_model, save_tiny

import offmoe
from offmoe.core.errors import BudgetError

Load = Callable[..., offmoe.Engine]

NUM_NEW = 16
FAMILIES = ("qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "granitemoe", "nemotron_h")
# Every way to serve a miss, fetch ahead and run the resident part.
SETTINGS: dict[str, dict[str, Any]] = {
    "auto": {},
    "streamed": {"miss": "stream"},
    "on the CPU": {"miss": "cpu"},
    "nothing ahead": {"prefetch": "off"},
    "two layers ahead": {"prefetch": 2},
    "compiled": {"compile": "on"},
    "not compiled": {"compile": "off"},
    "in one place": {"placement_invariant": True},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model of each family, in float32."""
    return {name: save_tiny(tmp_path_factory.mktemp(name), name) for name in FAMILIES}


def greedy(engine: offmoe.Engine, ids: list[int], num_new: int = NUM_NEW) -> list[int]:
    return list(engine.generate(ids, max_new_tokens=num_new, temperature=0, ignore_eos=True).token_ids)


def quarter(engine_folder: Path) -> int:
    """Slots for a quarter of the experts, and one token's experts at least."""
    with offmoe.load(engine_folder, device="cpu", ram="4GiB") as engine:
        return max(engine.top_k, engine.plan.num_experts // 4)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family: str, folders: dict[str, Path], load_on_device: Load) -> None:
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        expected = plain_model(folders[family])(input_ids=ids).logits
    with load_on_device(folders[family], expert_slots=quarter(folders[family])) as engine, torch.no_grad():
        got = engine.model(input_ids=ids.to(engine.model.device)).logits.cpu()
    assert float((got - expected).abs().max() / expected.abs().max()) < 1e-4


@pytest.mark.parametrize("setting", SETTINGS)
def test_ids_are_those_of_the_cpu(setting: str, folders: dict[str, Path], load_on_device: Load) -> None:
    folder = folders["qwen3_moe"]
    with offmoe.load(folder, device="cpu", ram="4GiB") as engine:
        expected = greedy(engine, PROMPT)
    with load_on_device(folder, expert_slots=quarter(folder), **SETTINGS[setting]) as engine:
        assert greedy(engine, PROMPT) == expected
        assert greedy(engine, PROMPT) == expected  # with slots, queues and predictors as the first run left them
        engine._parts.cache.settle()  # admitted experts may be on their way still: nobody waits for them
        assert_at_rest(engine)


def test_ids_in_one_place_do_not_depend_on_the_slots(load_on_device: Load) -> None:
    """The bundled model in its own bfloat16: whatever was cached, the same rounding."""
    outputs = []
    for slots in (4, 48, 192):
        with load_on_device(None, expert_slots=slots, placement_invariant=True) as engine:
            outputs.append(greedy(engine, list(range(20, 44))))
    assert outputs[0] == outputs[1] == outputs[2]


def test_the_peak_is_within_the_budget(load_on_device: Load) -> None:
    with load_on_device(None, vram="1GiB", context_length=1024) as engine:
        greedy(engine, [7 + position % 900 for position in range(1000)])
        stats = engine.stats()
        assert stats["device_planned_bytes"] <= stats["vram_bytes"] == 1 << 30
        if torch.cuda.is_available():
            assert torch.cuda.max_memory_reserved() < stats["device_peak_bytes"] <= 1 << 30
            assert stats["device_driver_bytes"] > 0


def test_too_little_is_refused_with_a_budget_that_works(load_on_device: Load) -> None:
    with pytest.raises(BudgetError, match="vram") as caught:
        load_on_device(None, vram="1MiB")
    advised = re.search(r"--vram (\d+MiB)", str(caught.value))
    assert advised is not None, str(caught.value)
    with load_on_device(None, vram=advised[1]) as engine:
        assert len(greedy(engine, PROMPT, 4)) == 4
        assert engine.stats()["device_planned_bytes"] <= engine.stats()["vram_bytes"]


def test_what_is_on_the_device_is_not_copied_again(load_on_device: Load) -> None:
    with load_on_device(None) as engine:
        total = engine.stats()["experts_total"]
        greedy(engine, PROMPT)
        before = engine.stats()
        greedy(engine, PROMPT)
        after = engine.stats()
        assert engine.stats()["device_slots"] == total
        assert after["misses"] == before["misses"]
        assert after["link_bytes"] == before["link_bytes"]


def test_a_layer_waits_for_the_device_once_at_most(load_on_device: Load) -> None:
    with load_on_device(None, expert_slots=48, compile="off") as engine:
        decode = engine.generate(PROMPT, max_new_tokens=NUM_NEW, temperature=0, ignore_eos=True).stats.decode
        assert decode.syncs <= decode.layer_calls


def test_two_engines_do_not_meet(folders: dict[str, Path], load_on_device: Load) -> None:
    with (
        load_on_device(folders["qwen3_moe"], expert_slots=4) as first,
        load_on_device(folders["mixtral"], expert_slots=4) as second,
    ):
        alone = greedy(first, PROMPT), greedy(second, PROMPT)
        assert (greedy(first, PROMPT), greedy(second, PROMPT)) == alone


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_closing_gives_the_memory_back(folders: dict[str, Path], load_on_device: Load) -> None:
    with load_on_device(folders["qwen3_moe"], expert_slots=4) as engine:
        greedy(engine, PROMPT, 2)  # what libraries keep for good is kept by now
    gc.collect()
    before = torch.cuda.memory_allocated()
    with load_on_device(None, vram="1GiB") as engine:
        greedy(engine, PROMPT, 4)
    del engine
    gc.collect()
    assert torch.cuda.memory_allocated() <= before + (1 << 20)
