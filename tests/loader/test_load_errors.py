"""Damaged checkpoints: the right class, one line with what, the numbers and what to do, and nothing left behind."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from _pytest.mark import ParameterSet
from damage import Change, edit_file, refuse, remove, set_config, set_tensors, write
from engines import open_tiny, save_tiny

from offmoe.checkpoint.index import INDEX_NAME
from offmoe.core.errors import CheckpointError, ModelNotFoundError, OffmoeError

UP = "model.layers.0.mlp.experts.3.up_proj.weight"
NO_WORDS = '{"tokenizer_class": "Qwen2Tokenizer"}'


def experts_in_config(number: int) -> Change:
    return set_config(num_experts=number, num_local_experts=number)


def without(name: str) -> Change:
    return set_tensors(lambda tensors: tensors.pop(name))


def cut_norm(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = torch.ones(5)


def cut_up(tensors: dict[str, torch.Tensor]) -> None:
    tensors[UP] = tensors[UP][:, :9].clone()


def as_bfloat16(tensors: dict[str, torch.Tensor]) -> None:
    tensors[UP] = tensors[UP].bfloat16()


def as_int8(tensors: dict[str, torch.Tensor]) -> None:
    tensors.update({name: t.to(torch.int8) for name, t in tensors.items() if ".experts." in name})


def remove_shard(index: int) -> Change:
    return lambda folder: sorted(folder.glob("*.safetensors"))[index].unlink()


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One good checkpoint in each layout. Nobody writes to them."""
    root = tmp_path_factory.mktemp("good")
    return {layout: save_tiny(root / layout, layout=layout) for layout in ("published", "stacked", "shards")}


@pytest.fixture
def copies(sources: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy that a test may damage."""
    return lambda layout: Path(shutil.copytree(sources[layout], tmp_path / "model"))


def damaged(
    name: str, change: Change, *words: str, layout: str = "published", error: type[OffmoeError] = CheckpointError
) -> ParameterSet:
    """One row of the table below; `words` are what the message must have."""
    return pytest.param(layout, change, error, words, id=name)


CONFIG = [
    damaged("none", remove("config.json"), "no config.json", "model folder", error=ModelNotFoundError),
    damaged("no JSON", write("config.json", "{"), "config.json", "JSON"),
    damaged("a list", write("config.json", "[]"), "config.json", "not an object"),
    damaged("no model type", set_config(model_type=None), "config.json", "no model_type"),
    damaged("value of a wrong type", set_config(hidden_size="big"), "config.json", "qwen3_moe", "hidden_size"),
    damaged("impossible number", set_config(num_attention_heads=0), "config.json", "qwen3_moe"),
    damaged("unknown activation", set_config(hidden_act="nope"), "config.json", "nope"),
    damaged("classes that are a number", set_config(architectures=2), "config.json: architectures is 2", "a list of"),
    damaged("classes that are a text", set_config(architectures="X"), "architectures is 'X'", "a list of class names"),
    damaged("top-k above experts", set_config(num_experts_per_tok=9), "config.json"),
    damaged("no experts", experts_in_config(0), "asks for no experts"),
    damaged("fewer experts", experts_in_config(7), "says 7 experts", "holds 8"),
    damaged("more experts", experts_in_config(9), "says 9 experts", "holds 8"),
    damaged("more stacked experts", experts_in_config(9), "says 9 experts", "holds 8", layout="stacked"),
    damaged("other expert width", set_config(moe_intermediate_size=24), "says [48, 48]", "holds [40, 48]"),
    damaged("other stacked width", set_config(moe_intermediate_size=24), "[48, 48]", "[40, 48]", layout="stacked"),
    damaged("other model width", set_config(hidden_size=64), "says [40, 64]", "holds [40, 48]"),
    damaged("other vocabulary", set_config(vocab_size=64), "is [128, 48]", "asks for [64, 48]"),
    damaged("more layers", set_config(num_hidden_layers=5), "no tensor for", "layers.3"),
]
TENSORS = [
    damaged("no norm", without("model.norm.weight"), "no tensor", "'model.norm.weight'"),
    damaged("no expert", without(UP), "says 8 experts", "holds 7"),
    damaged("norm of another shape", set_tensors(cut_norm), "model.norm.weight is [5]", "asks for [48]"),
    damaged("expert of another type", set_tensors(as_bfloat16), UP, "BF16", "F32", "must be alike"),
    damaged("expert of another shape", set_tensors(cut_up), UP, "[20, 9]", "must be alike"),
    damaged("experts of integers", set_tensors(as_int8), "stored as I8", "BF16"),
]
FILES = [
    damaged("no weights", remove("model.safetensors"), "no model.safetensors", error=ModelNotFoundError),
    damaged("truncated", edit_file(0, lambda raw: raw[:-9]), "model.safetensors", "truncated", "download"),
    damaged("empty", edit_file(0, lambda raw: b""), "model.safetensors", "0 bytes", "download"),
    damaged("header too long", edit_file(0, lambda raw: b"\xff" * 8 + raw[8:]), "model.safetensors", "claims"),
    damaged("header of noise", edit_file(0, lambda raw: raw[:8] + b"\x93" * len(raw)), "model.safetensors", "JSON"),
    damaged("no shard", remove_shard(3), "lacks 1 of ", "model-00004-of-", "download the rest", layout="shards"),
    damaged("truncated shard", edit_file(3, lambda raw: raw[:-1]), "model-00004-of-", "truncated", layout="shards"),
    damaged("no index", remove(INDEX_NAME), "safetensors files", "download the index", layout="shards"),
    damaged("index without a map", write(INDEX_NAME, "{}"), "index.json", "weight_map", layout="shards"),
    damaged("generation config", write("generation_config.json", "{"), "generation_config.json", "as JSON"),
    damaged("tokenizer", write("tokenizer.json", "{"), "tokenizer that cannot be read"),
    damaged(
        "tokenizer without words", write("tokenizer_config.json", NO_WORDS), "without a vocabulary", "tokenizer.json"
    ),
]


@pytest.mark.parametrize(("layout", "change", "error", "words"), CONFIG + TENSORS + FILES)
def test_a_damaged_checkpoint_is_refused(
    copies: Callable[[str], Path], layout: str, change: Change, error: type[OffmoeError], words: tuple[str, ...]
) -> None:
    folder = copies(layout)
    change(folder)
    refuse(folder, error, *words)


def test_a_missing_routing_bias_is_not_taken_as_zero(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "deepseek_v3")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    without(name)(folder)
    refuse(folder, CheckpointError, "no tensor", name)


def test_a_shorter_config_is_obeyed(copies: Callable[[str], Path]) -> None:
    """Fewer layers than the tensors have is how people cut a model to try it; transformers takes it too."""
    folder = copies("published")
    set_config(num_hidden_layers=2)(folder)
    with open_tiny(folder) as engine:
        assert engine.plan.num_experts == 8
