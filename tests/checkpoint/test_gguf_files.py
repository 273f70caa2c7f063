"""GGUF files in the layouts and under the names that people have them: run, or named truly."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf_makers import make_model, save_gguf
from gguf_parts import Change, rewrite, split_gguf
from makers import one_line
from numpy.typing import NDArray

import offmoe
from offmoe.checkpoint.index import read_config
from offmoe.checkpoint.locate import locate_model
from offmoe.core.errors import CheckpointError, ModelNotFoundError, OffmoeError, UnsupportedModelError
from offmoe.planner.inspect import inspect_checkpoint

Data = NDArray[Any]
KINDS = {"gate": Type.Q8_0, "up": Type.Q8_0, "down": Type.Q4_0}


def replies(path: Path) -> tuple[int, ...]:
    with offmoe.load(path, ram="4GiB", expert_slots=4) as engine:
        return tuple(engine.generate([5, 6, 7], max_new_tokens=8, temperature=0, ignore_eos=True).token_ids)


def one_an_expert(name: str, data: Data) -> dict[str, Data]:
    """Mixtral files of 2023: blk.0.ffn_gate.3.weight."""
    stem = name.removesuffix("_exps.weight")
    return {name: data} if stem == name else {f"{stem}.{idx}.weight": one for idx, one in enumerate(data)}


def with_gate_and_up(parts: dict[str, Data], fused: str, axis: int) -> Change:
    """`ffn_gate_exps` and `ffn_up_exps`, or q, k and v, in one tensor (`--fuse-gate-up-exps` of llama.cpp)."""
    names = tuple(parts)

    def change(name: str, data: Data) -> dict[str, Data]:
        leaf = name.split(".", 2)[-1]
        if leaf not in names:
            return {name: data}
        parts[leaf] = data
        layer = name[: -len(leaf)]
        return {layer + fused: np.concatenate([parts[part] for part in names], axis)} if leaf == names[-1] else {}

    return change


@pytest.mark.parametrize("name", ["llama", "qwen2moe"])
def test_one_tensor_an_expert_is_the_same_model(name: str, tmp_path: Path) -> None:
    stacked, old = tmp_path / "new.gguf", tmp_path / "old.gguf"
    save_gguf(stacked, name, make_model(name), KINDS)
    rewrite(stacked, old, one_an_expert)
    assert any(tensor.name == "blk.0.ffn_gate.3.weight" for tensor in gguf.GGUFReader(old).tensors)
    assert replies(old) == replies(stacked)
    assert inspect_checkpoint(old).experts_total_bytes == inspect_checkpoint(stacked).experts_total_bytes


def test_gate_and_up_in_one_tensor_are_the_same_model(tmp_path: Path) -> None:
    apart, fused = tmp_path / "apart.gguf", tmp_path / "fused.gguf"
    save_gguf(apart, "qwen3moe", make_model("qwen3moe"), KINDS)
    parts: dict[str, Data] = {f"ffn_{part}_exps.weight": np.empty(0) for part in ("gate", "up")}
    rewrite(apart, fused, with_gate_and_up(parts, "ffn_gate_up_exps.weight", 1))
    assert replies(fused) == replies(apart)


def test_queries_keys_and_values_in_one_tensor_are_the_same_model(tmp_path: Path) -> None:
    apart, fused = tmp_path / "apart.gguf", tmp_path / "fused.gguf"
    save_gguf(apart, "qwen2moe", make_model("qwen2moe"), KINDS | {"dense": Type.Q8_0})
    once: dict[str, Data] = {f"attn_{part}.weight": np.empty(0) for part in "qkv"}
    biases: dict[str, Data] = {f"attn_{part}.bias": np.empty(0) for part in "qkv"}
    weights, then = with_gate_and_up(once, "attn_qkv.weight", 0), with_gate_and_up(biases, "attn_qkv.bias", 0)
    rewrite(apart, fused, lambda name, data: then(name, data) if name.endswith("bias") else weights(name, data))
    assert replies(fused) == replies(apart)


@pytest.mark.parametrize("said", ["in block_count", "in no key", "behind block_count"])
def test_heads_for_further_tokens_are_left_out(said: str, tmp_path: Path) -> None:
    """One layer more, with the tensors that make it such a head."""
    plain, more = tmp_path / "plain.gguf", tmp_path / "more.gguf"
    save_gguf(plain, "qwen3moe", make_model("qwen3moe"), KINDS)
    last = read_config(plain)["num_hidden_layers"]

    def change(name: str, data: Data) -> dict[str, Data]:
        if not name.startswith("blk.0.attn_norm"):
            return {name: data}
        return {name: data, f"blk.{last}.attn_norm.weight": data, f"blk.{last}.nextn.enorm.weight": data}

    numbers = {"block_count": last if said == "behind block_count" else last + 1}
    rewrite(plain, more, change, numbers=numbers | ({"nextn_predict_layers": 1} if said == "in block_count" else {}))
    assert read_config(more)["num_hidden_layers"] == last
    assert replies(more) == replies(plain)


def test_a_layer_too_many_is_named(tmp_path: Path) -> None:
    plain, more = tmp_path / "plain.gguf", tmp_path / "more.gguf"
    save_gguf(plain, "qwen3moe", make_model("qwen3moe"), KINDS)
    rewrite(plain, more, lambda name, data: {name: data}, numbers={"block_count": 1})
    with pytest.raises(CheckpointError, match="has tensors of layer 1, which is no head for further tokens"):
        read_config(more)


@pytest.mark.parametrize("name", ["sha256-1a2b", "model.bin", "model.gguf.download"])
def test_a_file_is_what_its_first_bytes_say(name: str, tmp_path: Path) -> None:
    path, plain = tmp_path / name, tmp_path / "plain.gguf"
    save_gguf(plain, "qwen3moe", make_model("qwen3moe"), KINDS)
    path.write_bytes(plain.read_bytes())
    assert locate_model(path) == path
    assert replies(path) == replies(plain)


NOT_GGUF = {
    b"version https://git-lfs.github.com/spec/v1": "a pointer of Git LFS",
    b"<!doctype html>": "it is a web page",
    b"tjgg" + bytes(60): "format of spring 2023 (ggjt)",
    bytes(64): "begins with zeros, as an unfinished download does",
    b"PK\x03\x04" + bytes(60): "zip archive or PyTorch file",
    b"something else": "does not begin with GGUF",
}


@pytest.mark.parametrize("begin", NOT_GGUF)
def test_other_files_are_named(begin: bytes, tmp_path: Path) -> None:
    for name in ("model.gguf", "model"):
        (tmp_path / name).write_bytes(begin)
        with pytest.raises(OffmoeError) as caught:
            read_config(locate_model(tmp_path / name))
        assert NOT_GGUF[begin] in one_line(caught)


def test_a_piece_of_a_cut_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.gguf-split-b").write_bytes(b"\x05" * 100)
    with pytest.raises(ModelNotFoundError, match=r"a piece of a file that was cut; join the pieces in order"):
        locate_model(tmp_path / "model.gguf-split-b")


def test_a_big_endian_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "qwen3moe", endianess=gguf.GGUFEndian.BIG)
    writer.add_block_count(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError) as caught:
        offmoe.load(path)
    line = one_line(caught)
    assert "model.gguf is a big-endian GGUF file" in line
    assert "download it again" not in line


def test_renamed_parts_are_named(tmp_path: Path) -> None:
    whole, first = tmp_path / "model.gguf", tmp_path / "parts-00001-of-00003.gguf"
    save_gguf(whole, "llama", make_model("llama"), KINDS)
    split_gguf(whole, first, num_parts=3)
    second, third = (tmp_path / f"parts-0000{number}-of-00003.gguf" for number in (2, 3))
    spare = tmp_path / "spare"
    third.rename(spare), second.rename(third), spare.rename(second)
    with pytest.raises(CheckpointError) as caught:
        offmoe.load(first, ram="4GiB")
    assert "is part 3 of 3 of a split model, by its name part 2 of 3; give all parts their names back" in one_line(
        caught
    )
    first.rename(tmp_path / "first.gguf")
    with pytest.raises(CheckpointError) as caught:
        offmoe.load(tmp_path / "first.gguf", ram="4GiB")
    assert "first.gguf is part 1 of 3 of a split model, by its name it is whole" in one_line(caught)
    assert "NAME-00001-of-00003.gguf" in one_line(caught)


def write_kind(path: Path, architecture: str, kind: str | None) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    if kind is not None:
        writer.add_type(kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_projectors_and_importance_matrices_are_no_models(tmp_path: Path) -> None:
    vision, matrix, model = tmp_path / "vision.gguf", tmp_path / "a.gguf", tmp_path / "sub" / "model-Q8_0.gguf"
    write_kind(vision, "clip", "mmproj")
    write_kind(matrix, "", "imatrix")
    with pytest.raises(ModelNotFoundError) as caught:
        locate_model(tmp_path)
    assert "a.gguf is an importance matrix; name the model's own file" in one_line(caught)
    model.parent.mkdir()
    save_gguf(model, "qwen3moe", make_model("qwen3moe"), KINDS)
    assert locate_model(tmp_path) == model
    with pytest.raises(ModelNotFoundError, match=r"vision\.gguf is a vision projector and no language model"):
        locate_model(vision)
    (tmp_path / "model-Q4_0.gguf").write_bytes(model.read_bytes())
    with pytest.raises(ModelNotFoundError) as caught:
        locate_model(tmp_path)
    assert re.search(r"has 2 GGUF models; name one: model-Q4_0\.gguf, sub/model-Q8_0\.gguf$", one_line(caught))


def test_a_folder_with_a_config_and_gguf_files_alone_asks_which(tmp_path: Path) -> None:
    """As repositories of GGUF files are; where safetensors lie beside them, those are the model."""
    (tmp_path / "config.json").write_text("{}")
    for name in ("a.gguf", "b.gguf"):
        save_gguf(tmp_path / name, "qwen3moe", make_model("qwen3moe"), {})
    with pytest.raises(ModelNotFoundError, match=r"has 2 GGUF models; name one: a\.gguf, b\.gguf"):
        locate_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert locate_model(tmp_path) == tmp_path


def test_an_entry_of_the_cache_is_its_snapshot(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    save_gguf(snapshot / "a.gguf", "qwen3moe", make_model("qwen3moe"), {})
    assert locate_model(tmp_path / "models--owner--name") == snapshot / "a.gguf"
