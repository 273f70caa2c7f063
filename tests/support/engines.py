"""Small real models on disk, opened by offmoe and by transformers, and what an engine must not leave behind."""

from __future__ import annotations

import gc
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from families import build, save_layout
from transformers import AutoModelForCausalLM, PreTrainedModel

import offmoe
from offmoe.api import load_engine
from offmoe.checkpoint.locate import demo_model_folder
from offmoe.core.config import make_config
from offmoe.loader.fetch import fetch_model
from offmoe.machine.memory import rss_bytes
from offmoe.tiers.device import Device

# The tiny Qwen3-MoE: a dense layer, then two of eight experts, top-2; a quarter of its experts.
TINY_EXPERTS, QUARTER = 16, 4
PROMPT = [5, 77, 31, 8, 99, 12, 64, 3, 41, 110]


def save_tiny(folder: Path, name: str = "qwen3_moe", *, seed: int = 0, layout: str = "published") -> Path:
    """A tiny family model in float32, without a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    save_layout(build(name, seed=seed), folder, layout)  # type: ignore[arg-type]
    return folder


def save_speaking(folder: Path) -> Path:
    """A tiny random model with the demo model's vocabulary and chat template; 32 experts."""
    folder.mkdir(parents=True, exist_ok=True)
    overrides = {"vocab_size": 4096, "max_position_embeddings": 2048, "num_experts": 16}
    save_layout(build("qwen3_moe", overrides=overrides), folder, "published")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_model_folder() / name, folder)
    return folder


def load(folder: Path | str | None = None, *, simulated: Device | None = None, **options: Any) -> offmoe.Engine:
    """As `offmoe.load`; on the device `simulated`, which the engine closes, where there is one."""
    if simulated is None:
        return offmoe.load(folder, **options)
    beside = {"progress": options.pop("progress")} if "progress" in options else {}
    config, baseline_bytes = make_config(**options), rss_bytes()
    found = fetch_model(folder, config)
    return load_engine(found, config, baseline_bytes=baseline_bytes, tell=print, device=simulated, **beside)


def open_tiny(folder: Path, **options: Any) -> offmoe.Engine:
    """With room for a quarter of the experts, unless `options` say otherwise."""
    return load(folder, **{"ram": "4GiB", "expert_slots": QUARTER, **options})


def plain_model(folder: Path) -> PreTrainedModel:
    """The same checkpoint in transformers' hands, whole and eager."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    assert isinstance(model, PreTrainedModel)
    return model.eval()


def engine_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("offmoe")}


def open_checkpoint_files() -> list[str]:
    return sorted(file.path for file in psutil.Process().open_files() if file.path.endswith(".safetensors"))


@contextmanager
def leaves_nothing() -> Iterator[None]:
    """Within: engines may come and go. Afterwards there is no thread and no open checkpoint file more than before."""
    if engine_threads() or open_checkpoint_files():  # of engines that nobody refers to any more; it takes a second
        gc.collect()
    threads, files = engine_threads(), open_checkpoint_files()
    yield
    assert engine_threads() == threads
    assert open_checkpoint_files() == files


def assert_at_rest(engine: offmoe.Engine) -> None:
    """No hold, no read under way, and the slot table agrees with itself."""
    cache = engine._parts.cache
    cache.settle()  # what was fetched ahead may be on its way; what was asked for may not
    cache.slots.check_integrity()
    assert ", 0 filling," in repr(cache) and "| 0 held |" in repr(cache), repr(cache)
