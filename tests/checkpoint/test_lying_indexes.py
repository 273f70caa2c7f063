"""Folders whose index or tensors lie in harmless ways: the logits of `from_pretrained` on the same folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import open_tiny, plain_model, save_tiny
from makers import write_shards
from safetensors.torch import load_file, save_file

from offmoe.checkpoint.index import INDEX_NAME, SINGLE_NAME

IDS = torch.randint(3, 100, (1, 12), generator=torch.Generator().manual_seed(1))
Tensors = dict[str, torch.Tensor]


def edit_map(edit: Callable[[dict[str, str]], Any]) -> Callable[[Path, Tensors], None]:
    """Two shards, and an index that was changed."""

    def change(folder: Path, tensors: Tensors) -> None:
        (folder / SINGLE_NAME).unlink()
        names = sorted(tensors)
        halves = names[::2], names[1::2]
        write_shards(folder, {f"{idx}.safetensors": {n: tensors[n] for n in half} for idx, half in enumerate(halves)})
        index = json.loads((folder / INDEX_NAME).read_text())
        edit(index["weight_map"])
        (folder / INDEX_NAME).write_text(json.dumps(index))

    return change


def exchange(weight_map: dict[str, str]) -> None:
    first, second = sorted(weight_map)[:2]
    weight_map[first], weight_map[second] = weight_map[second], weight_map[first]


def stale_index(folder: Path, tensors: Tensors) -> None:
    gone = {"model.norm.weight": "model-00001-of-00009.safetensors"}
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": gone}))


def stored_too(**extra: Callable[[Tensors], torch.Tensor]) -> Callable[[Path, Tensors], None]:
    """More tensors, by names in which two underscores stand for a dot."""

    def change(folder: Path, tensors: Tensors) -> None:
        more = {name.replace("__", "."): make(tensors).clone() for name, make in extra.items()}
        save_file(tensors | more, folder / SINGLE_NAME, metadata={"format": "pt"})

    return change


def head_twice(folder: Path, tensors: Tensors) -> None:
    """The head in both shards."""
    (folder / SINGLE_NAME).unlink()
    head = {"lm_head.weight": tensors.pop("lm_head.weight")}
    write_shards(folder, {"0.safetensors": tensors | head, "1.safetensors": head})


FOLDERS: dict[str, Callable[[Path, Tensors], None]] = {
    "names exchanged": edit_map(exchange),
    "a tied head that is in no shard": edit_map(lambda names: names.update({"lm_head.bias": "0.safetensors"})),
    "an old buffer that is in no shard": edit_map(
        lambda names: names.update({"model.layers.0.self_attn.rotary_emb.inv_freq": "1.safetensors"})
    ),
    "a tensor that the index lacks": edit_map(lambda names: names.pop("model.norm.weight")),
    "a stale index beside a whole file": stale_index,
    "a head in two shards": head_twice,
    "an old buffer is stored": stored_too(
        model__layers__0__self_attn__rotary_emb__inv_freq=lambda tensors: torch.ones(8)
    ),
}


@pytest.mark.parametrize("change", FOLDERS.values(), ids=FOLDERS)
def test_harmless_lies_change_nothing(change: Callable[[Path, Tensors], None], tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    change(folder, load_file(folder / SINGLE_NAME))
    check(folder)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_tied_head_that_is_stored_too(scale: float, tmp_path: Path) -> None:
    """Equal to the embedding, or another: then transformers does not tie them, and neither do we."""
    folder = save_tiny(tmp_path / "model", "ernie4_5_moe")
    tensors = load_file(folder / SINGLE_NAME)
    assert "lm_head.weight" not in tensors
    head = tensors["model.embed_tokens.weight"] * scale
    save_file(tensors | {"lm_head.weight": head}, folder / SINGLE_NAME, metadata={"format": "pt"})
    check(folder)


def check(folder: Path) -> None:
    with torch.no_grad():
        wanted = plain_model(folder)(input_ids=IDS).logits
    with open_tiny(folder) as engine:
        with torch.no_grad():
            got = engine.model(input_ids=IDS).logits
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
