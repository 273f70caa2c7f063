"""scripts/make_checkpoint.py writes what transformers loads and saves, for every family it knows."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from places import SCRIPTS
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from offmoe.decode.families.common import spec_of

FAMILIES = ["deepseek-v2-lite", "gpt-oss-20b", "mixtral-8x7b", "olmoe", "qwen3-30b-a3b"]


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    sys.path.insert(0, str(SCRIPTS))
    try:
        yield importlib.import_module("make_checkpoint")
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module", params=FAMILIES)
def made(request: pytest.FixtureRequest, script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny two-layer float32 checkpoint in shards of 100 kB."""
    out: Path = tmp_path_factory.mktemp("made") / str(request.param)
    command = f"--like {request.param} --layers 2 --tiny --dtype float32 --max-shard-size 100KB --out {out}"
    assert script.main(command.split()) == 0
    return out


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def load(folder: Path) -> tuple[Any, dict[str, Any]]:
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, experts_implementation="eager", attn_implementation="eager"
    )
    model, info = loaded
    return model, info


def test_transformers_loads_every_key(made: Path) -> None:
    _, info = load(made)
    assert not any(info.values()), info


def test_names_shapes_and_numbers_are_what_transformers_publishes(made: Path, tmp_path: Path) -> None:
    model, _ = load(made)
    model.save_pretrained(tmp_path)
    saved, written = read_tensors(tmp_path), read_tensors(made)
    assert {name: tensor.shape for name, tensor in saved.items()} == {
        name: tensor.shape for name, tensor in written.items()
    }
    assert all(torch.equal(tensor, saved[name]) for name, tensor in written.items())


def test_index_names_every_tensor_and_shards_keep_to_their_size(made: Path) -> None:
    index = json.loads((made / "model.safetensors.index.json").read_text())
    tensors = read_tensors(made)
    assert set(index["weight_map"]) == set(tensors)
    assert set(index["weight_map"].values()) == {path.name for path in made.glob("*.safetensors")}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    largest = max(tensor.nbytes for tensor in tensors.values())
    for path in made.glob("*.safetensors"):
        header_bytes = int.from_bytes(path.read_bytes()[:8], "little")
        assert header_bytes % 8 == 0
        assert path.stat().st_size - 8 - header_bytes <= max(100_000, largest)


def test_logits_are_finite_and_routing_spreads(made: Path) -> None:
    model, _ = load(made)
    ids = torch.tensor([json.loads((made / "ids.json").read_text())[:128]])
    chosen: set[int] = set()
    num_experts = model.config.num_experts
    for name, module in model.named_modules():
        if name.endswith("mlp.experts"):
            module.register_forward_pre_hook(lambda _, args: chosen.update(args[1].flatten().tolist()))
    with torch.no_grad():
        logits = model(ids).logits
    assert torch.isfinite(logits).all()
    assert logits.std() > 0.05
    assert len(chosen) > num_experts / 2


def test_tokenizer_round_trips_and_ids_are_its_own(made: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(made)
    text = 'def f(x):\n    return "naïve: 5 €"'
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    ids = json.loads((made / "ids.json").read_text())
    assert len(ids) >= 2048
    assert len(tokenizer) == AutoConfig.from_pretrained(made).vocab_size == 512
    assert tokenizer.decode(ids[:40]).strip()
    assert max(ids) < 512


@pytest.mark.parametrize("like", FAMILIES)
def test_real_sizes_agree_with_transformers(script: ModuleType, like: str, tmp_path: Path) -> None:
    config = script.build_config(like, num_layers=3, vocab_size=1000, dtype="bfloat16")
    (tmp_path / "config.json").write_text(json.dumps(config))
    from_config: Any = AutoModelForCausalLM.from_config
    with torch.device("meta"):
        model = from_config(AutoConfig.from_pretrained(tmp_path))
    specs = list(script.tensor_specs(like, config))
    assert sum(spec.num_elements for spec in specs) == sum(p.numel() for p in model.parameters())
    assert all(spec.num_elements == math.prod(spec.shape) for spec in specs)


def test_weights_do_not_depend_on_the_shard_size(script: ModuleType, tmp_path: Path) -> None:
    for name, size in (("small", "50KB"), ("large", "1GB")):
        command = f"--like olmoe --layers 1 --tiny --max-shard-size {size} --out {tmp_path / name}"
        assert script.main(command.split()) == 0
    small, large = read_tensors(tmp_path / "small"), read_tensors(tmp_path / "large")
    assert small.keys() == large.keys()
    assert all(torch.equal(small[name], large[name]) for name in small)
    assert {tensor.dtype for tensor in small.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--layers 0", "--layers must be at least 1"),
        ("--layers 1 --vocab 100", "--vocab must be at least 257"),
        ("--layers 1 --max-shard-size huge", "'huge' is not a size"),
        ("--layers 5000", "the disk has"),
    ],
)
def test_bad_options_end_in_one_line(
    script: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path, options: str, message: str
) -> None:
    command = f"--like mixtral-8x7b --out {tmp_path / 'out'} {options}"
    if "5000" not in options:
        command += " --tiny"
    assert script.main(command.split()) == 2
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert last_line.startswith("error: ")
    assert message in last_line


def test_a_folder_in_use_is_left_alone(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    assert script.main(f"--like olmoe --layers 1 --tiny --out {tmp_path}".split()) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("like", ["qwen3.5-moe", "glm-4.5-air", "deepseek-v3", "gemma-4-26b-a4b"])
def test_further_shapes_decode_by_a_spec(like: str, script: ModuleType) -> None:
    """Whole ones are gigabytes: here their tensors are counted, and the model's own class has each of them."""
    from benchlib.shapes import SHAPES, shape_config, shape_specs

    assert like in SHAPES
    written = shape_config(like, num_layers=6, vocab_size=512, dtype="bfloat16")
    config = AutoConfig.for_model(**written)
    assert spec_of(config).moe is not None
    specs = {spec.name: spec for spec in shape_specs(written)}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert specs.keys() == model.state_dict().keys() - ({"lm_head.weight"} if config.tie_word_embeddings else set())
    assert specs["model.norm.weight"].ones and not specs["model.embed_tokens.weight"].ones
