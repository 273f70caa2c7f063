"""Prompts kept on disk: the bits of a fresh reading in the next run; damaged, hostile and others' files are refused."""

from __future__ import annotations

import json
import stat
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import open_tiny, save_tiny
from logs import logs_warning
from safetensors import safe_open
from test_kept_bits import IDS, OTHER, equal, logits

import offmoe
from offmoe.core.errors import OutputError, UsageError
from offmoe.kv.flat_states import FlatError, flatten, unflatten


def open_with(folder: Path, cache: Path, **options: Any) -> offmoe.Engine:
    given = {"prefill_chunk": 64, "context_length": 256, "kept_prompts": "64MiB", "prompt_cache": cache}
    return open_tiny(folder, **{**given, **options})


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "qwen3_next", "granitemoehybrid", "lfm2_moe"])
def test_the_next_run_goes_on_with_the_same_bits(name: str, tmp_path: Path) -> None:
    model, cache = save_tiny(tmp_path / "model", name), tmp_path / "cache"
    with open_with(model, cache) as engine:
        fresh, _ = logits(engine, IDS, reuse=False)
        logits(engine, IDS[:215])
    files = sorted(cache.iterdir())
    assert len(files) == 3 and all(len(file.stem) == 64 and file.suffix == ".safetensors" for file in files)
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600} and stat.S_IMODE(
        cache.stat().st_mode
    ) == 0o700
    with safe_open(files[0], "pt") as file:
        assert file.metadata()["format"] == "offmoe_kept_prompt"
    with open_with(model, cache) as engine:
        got, num = logits(engine, IDS)
        assert num == 192 and equal(got, fresh)
        stats = engine.stats().kept_prompts
        assert stats is not None and stats["disk_blocks"] == 3 and stats["disk_refused"] == 0
    with open_with(model, cache) as engine:
        assert logits(engine, IDS, cache_salt="other")[1] == 0
    with open_with(model, cache, prefill_chunk=32) as engine:
        assert logits(engine, IDS)[1] == 0, "read in other pieces, rows have other bits"


def _damage(path: Path, how: str) -> None:  # noqa: PLR0912
    data = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    if how == "a bit":
        data[-3] ^= 4
    elif how == "shorter":
        del data[-10:]
    elif how == "longer":
        data += b"x"
    elif how == "header length":
        data[:8] = struct.pack("<Q", 1 << 60)
    elif how == "no json":
        data[8] = ord("x")
    elif how == "empty":
        data.clear()
    else:
        key = next(key for key in header if key != "__metadata__")
        if how == "shape":
            header[key]["shape"] = header[key]["shape"][::-1]
        elif how == "type":
            header[key]["dtype"] = "I64"
        elif how == "place":
            header[key]["data_offsets"] = [-8, 1 << 62]
        elif how == "rows":
            header["__metadata__"]["rows"] = '{"t": "none"}'
        elif how == "deep":
            header["__metadata__"]["rows"] = '{"l":[' * 5000
        elif how == "name":
            header["__metadata__"]["name"] = "0" * 64
        elif how == "metadata":
            header["__metadata__"] = 3
        text = json.dumps(header).encode()
        data[: 8 + length] = struct.pack("<Q", len(text)) + text
    path.write_bytes(data)


WAYS = [
    "a bit", "shorter", "longer", "header length", "no json", "empty", "shape", "type", "place", "rows", "deep", "name",
    "metadata",
]  # fmt: skip


def test_damaged_and_hostile_files_are_refused_and_removed(tmp_path: Path) -> None:
    model, cache = save_tiny(tmp_path / "model"), tmp_path / "cache"
    with open_with(model, cache) as engine:
        fresh, _ = logits(engine, IDS, reuse=False)
        logits(engine, IDS)
    good = {path: path.read_bytes() for path in cache.iterdir()}
    for how in WAYS:
        for path, data in good.items():
            path.write_bytes(data)
            _damage(path, how)
        with logs_warning("is no kept prompt of this model: .*; it is removed"), open_with(model, cache) as engine:
            got, num = logits(engine, IDS)
            assert (num, equal(got, fresh)) == (0, True), how
            assert engine._kept.keeper is not None and engine._kept.keeper.files is not None
            assert engine._kept.keeper.files.num_refused == 1, how


def test_files_of_another_prompt_under_its_name_are_refused(tmp_path: Path) -> None:
    model, cache = save_tiny(tmp_path / "model"), tmp_path / "cache"
    with open_with(model, cache) as engine:
        logits(engine, IDS)
    before = set(cache.iterdir())
    with open_with(model, cache) as engine:
        fresh, _ = logits(engine, OTHER)
    for path, other in zip(sorted(set(cache.iterdir()) - before), sorted(before), strict=False):
        path.write_bytes(other.read_bytes())
    with logs_warning("another name or form"), open_with(model, cache) as engine:
        got, num = logits(engine, OTHER)
        assert num == 0 and equal(got, fresh)


def test_other_files_and_links_are_left_alone(tmp_path: Path) -> None:
    model, cache = save_tiny(tmp_path / "model"), tmp_path / "cache"
    cache.mkdir()
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (cache / "notes.txt").write_text("mine")
    (cache / f"{'a' * 64}.safetensors").symlink_to(secret)
    with open_with(model, cache, prompt_cache_size="1MiB") as engine:
        logits(engine, IDS)
    assert (cache / "notes.txt").read_text() == "mine" and secret.read_text() == "secret"
    assert (cache / f"{'a' * 64}.safetensors").is_symlink()


def test_the_folder_stays_within_its_size(tmp_path: Path) -> None:
    model, cache = save_tiny(tmp_path / "model"), tmp_path / "cache"
    with open_with(model, cache, prompt_cache_size="1MiB") as engine:
        for salt in range(20):
            logits(engine, [(i * 7 + salt) % 120 for i in range(240)])
    assert sum(path.stat().st_size for path in cache.iterdir()) <= 1 << 20
    assert not list(cache.glob("*.tmp")) and len(list(cache.iterdir())) > 3
    with open_with(model, cache) as engine:
        assert logits(engine, [(i * 7 + 19) % 120 for i in range(240)])[1] == 192, "the last one is there"


def test_folders_that_cannot_be_are_told(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"prompt_cache .*file cannot be used"):
        open_with(model, tmp_path / "file")
    with pytest.raises(UsageError, match="prompt_cache_size is set without a folder"):
        open_tiny(model, prompt_cache_size="1GiB")
    with pytest.raises(UsageError, match="prompt_cache is 3"):
        open_tiny(model, prompt_cache=3)


def test_values_come_back_as_they_were() -> None:
    tensors: dict[str, torch.Tensor] = {}
    value = {"a": [1, 2.5, None, True], 0: (torch.ones(2), {"b": torch.float16}), "c": torch.device("cpu")}
    again = unflatten(json.loads(json.dumps(flatten(value, tensors, "x"))), tensors)
    assert str(again) == str(value)
    with pytest.raises(FlatError):
        flatten(object(), tensors, "x")
    for wrong in ({}, {"t": "y"}, {"v": []}, {"dtype": "os"}, {"device": "disk"}, {"x": 1}, 3, {"d": 3}):
        with pytest.raises((FlatError, TypeError)):
            unflatten(wrong, tensors)
