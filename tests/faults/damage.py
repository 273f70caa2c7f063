"""Ways to damage a checkpoint, and the check that loading it is refused as it should be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import leaves_nothing
from makers import one_line
from safetensors.torch import load_file, save_file

import offmoe
from offmoe.core.errors import OffmoeError

Change = Callable[[Path], None]


def refuse(model: Path | str, error: type[OffmoeError], *words: str, **options: Any) -> str:
    """Loading fails with just this class and with `words` in its one line, and leaves nothing behind."""
    with leaves_nothing(), pytest.raises(OffmoeError) as caught:
        offmoe.load(model, **{"ram": "4GiB", **options})
    text = one_line(caught)
    assert type(caught.value) is error, text
    for word in words:
        assert word in text
    return text


def set_config(**values: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def set_tensors(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors")

    return change


def write(name: str, text: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).write_text(text)

    return change


def remove(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def edit_file(index: int, edit: Callable[[bytes], bytes]) -> Change:
    """Rewrite one of the shards, in the order of their names."""

    def change(folder: Path) -> None:
        path = sorted(folder.glob("*.safetensors"))[index]
        path.write_bytes(edit(path.read_bytes()))

    return change
