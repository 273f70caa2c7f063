"""Compiled decode steps on a CUDA device: graphs are recorded and replayed, in any thread, with the same ids."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from engines import PROMPT, save_tiny

import offmoe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore"),  # torch's own, while it compiles
]
NUM_NEW = 32


def ids_of(engine: offmoe.Engine) -> tuple[int, ...]:
    return engine.generate(PROMPT, max_new_tokens=NUM_NEW, temperature=0, ignore_eos=True).token_ids


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return save_tiny(tmp_path, request.param)


def open_on_device(folder: Path, compile_option: str) -> offmoe.Engine:
    return offmoe.load(folder, ram="8GiB", vram="4GiB", device="cuda", compile=compile_option)


@pytest.mark.parametrize("folder", ["qwen3_moe", "gpt_oss", "deepseek_v3", "qwen3_next"], indirect=True)
def test_graphs_give_the_same_ids(folder: Path) -> None:
    with open_on_device(folder, "off") as engine:
        expected = ids_of(engine)
    with open_on_device(folder, "on") as engine:
        for _ in range(3):
            assert ids_of(engine) == expected
        assert engine.stats()["compile"] == "on"


@pytest.mark.parametrize("folder", ["qwen3_moe"], indirect=True)
def test_graphs_are_recorded(folder: Path) -> None:
    """One graph before the first experts call, one between each two, one behind the last."""
    from torch._dynamo.utils import counters

    counters.clear()
    with open_on_device(folder, "on") as engine:
        ids_of(engine)
        num_calls = sum(1 for name, _ in engine.model.named_modules() if name.endswith(".experts"))
        assert counters["inductor"]["cudagraph_partitions"] >= num_calls + 1
        assert counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.parametrize("folder", ["qwen3_moe"], indirect=True)
def test_nothing_is_allocated_by_later_steps(folder: Path) -> None:
    with open_on_device(folder, "on") as engine:
        for _ in range(2):
            ids_of(engine)
        before = torch.cuda.memory_allocated()
        for _ in range(3):
            ids_of(engine)
        assert torch.cuda.memory_allocated() <= before + (1 << 20)


@pytest.mark.parametrize("folder", ["qwen3_moe"], indirect=True)
def test_in_another_thread(folder: Path) -> None:
    with open_on_device(folder, "off") as engine:
        expected = ids_of(engine)
    with open_on_device(folder, "on") as engine:
        assert ids_of(engine) == expected
        found: list[tuple[int, ...]] = []
        thread = threading.Thread(target=lambda: found.append(ids_of(engine)))
        thread.start()
        thread.join()
        assert found == [expected]
        assert engine.stats()["compile"] == "on"


@pytest.mark.parametrize("folder", ["qwen3_moe"], indirect=True)
def test_in_the_background(folder: Path) -> None:
    with open_on_device(folder, "auto") as engine:
        first = ids_of(engine)
        compiler = engine._decode
        assert compiler is not None
        if compiler._thread is not None:
            compiler._thread.join()
        assert ids_of(engine) == first
        assert engine.stats()["compile"] == "on"
