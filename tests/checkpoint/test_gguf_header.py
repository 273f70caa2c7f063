"""GGUF headers as hostile input: what cannot be is refused in one line, before anything is taken on trust."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from makers import one_line

from offmoe.checkpoint.gguf.header import GgufHeader, read_gguf_header
from offmoe.checkpoint.index import read_config
from offmoe.checkpoint.locate import locate_model
from offmoe.checkpoint.shard_file import ShardFile
from offmoe.core.errors import CheckpointError, OffmoeError, UnsupportedModelError
from offmoe.loader.build import read_model_config

U32, F32, TEXT, LIST, U64 = 4, 6, 8, 9, 10
NO_ITEMS, MANY_ITEMS = struct.pack("<IQ", U32, 0), struct.pack("<IQ", U32, 1 << 60)
PAIRS = [("general.architecture", TEXT, "qwen3moe"), ("qwen3moe.block_count", U32, 2)]
# name, sizes innermost first, type, offset
TENSORS = [("a.weight", (64, 3), 0, 0), ("b.weight", (256, 2, 2), 12, 768)]


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def value(kind: int, item: Any) -> bytes:
    match kind:
        case 8:
            return text(item)
        case 9:
            item_kind, items = item
            return struct.pack("<IQ", item_kind, len(items)) + b"".join(value(item_kind, one) for one in items)
        case _:
            return struct.pack({4: "<I", 6: "<f", 10: "<Q"}[kind], item)


def gguf_bytes(
    pairs: Sequence[tuple[str, int, Any]] = PAIRS, tensors: Sequence[tuple[str, tuple[int, ...], int, int]] = TENSORS,
    *, data_bytes: int = 2048, version: int = 3, counts: tuple[int, int] | None = None,
) -> bytes:  # fmt: skip
    num_tensors, num_pairs = counts or (len(tensors), len(pairs))
    head = b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_pairs)
    head += b"".join(text(key) + struct.pack("<I", kind) + value(kind, item) for key, kind, item in pairs)
    for name, sizes, type_number, offset in tensors:
        head += text(name) + struct.pack("<I", len(sizes)) + struct.pack(f"<{len(sizes)}Q", *sizes)
        head += struct.pack("<IQ", type_number, offset)
    return head + bytes(-len(head) % 32) + bytes(data_bytes)


def read(path: Path, raw: bytes) -> GgufHeader:
    path.write_bytes(raw)
    file = ShardFile(path)
    try:
        return read_gguf_header(file, file_idx=0)
    finally:
        file.close()


def test_names_shapes_and_places_are_read(tmp_path: Path) -> None:
    many = ("tokenizer.ggml.scores", LIST, (F32, [0.5] * 5000))
    header = read(tmp_path / "m.gguf", gguf_bytes([*PAIRS, many, ("few", LIST, (U32, [1, 2]))]))
    assert header.architecture == "qwen3moe"
    assert header.metadata["few"] == [1, 2]
    skipped = header.metadata["tokenizer.ggml.scores"]
    assert (skipped.num_items, skipped.form, skipped.num_bytes) == (5000, "<f", 20000)
    plain, blocks = header.tensors["a.weight"], header.tensors["b.weight"]
    assert (plain.kind, plain.shape, plain.entry.dtype, plain.entry.num_bytes) == (None, (3, 64), "F32", 768)
    assert (blocks.kind, blocks.shape, blocks.entry.shape) == ("q4_k", (2, 2, 256), (2, 2, 144))
    assert blocks.entry.start == plain.entry.start + 768
    assert blocks.entry.start % 32 == 0


HOSTILE: dict[str, tuple[bytes, str]] = {
    "cut off": (gguf_bytes()[:60], "ends inside its header"),
    "many tensors": (gguf_bytes(counts=(1 << 40, 2)), "claims 1099511627776 tensors"),
    "many pairs": (gguf_bytes(counts=(2, 1 << 40)), "1099511627776 metadata pairs"),
    "long text": (gguf_bytes()[:24] + struct.pack("<Q", 1 << 60) + bytes(100), "a text claims"),
    "long list": (gguf_bytes([("x", LIST, (U32, []))]).replace(NO_ITEMS, MANY_ITEMS),
                  "claims 1152921504606846976 items"),
    "lists in lists in lists": (gguf_bytes([("x", LIST, (LIST, [(LIST, [(LIST, [])])]))]), "is of type 9"),
    "unknown type": (gguf_bytes([("x", TEXT, "")]).replace(text("x") + b"\x08", text("x") + b"\x63"), "of type 99"),
    "key twice": (gguf_bytes([*PAIRS, PAIRS[1]]), "'qwen3moe.block_count' twice"),
    "tensor twice": (gguf_bytes(tensors=[TENSORS[0], ("a.weight", (64, 3), 0, 768)]), "'a.weight' is there twice"),
    "overlap": (gguf_bytes(tensors=[TENSORS[0], ("b", (64, 3), 0, 64)]), "'a.weight' and 'b' overlap"),
    "past the end": (gguf_bytes(tensors=[("a", (64, 3), 0, 1 << 40)]), "'a' ends at byte"),
    "offset wraps": (gguf_bytes(tensors=[("a", (64, 3), 0, (1 << 64) - 32)]), "'a' ends at byte"),
    "no size": (gguf_bytes(tensors=[("a", (64, 0), 0, 0)]), "has shape [0, 64]"),
    "huge sizes": (gguf_bytes(tensors=[("a", (1 << 62, 1 << 62), 0, 0)]), "'a' has shape"),
    "nine dimensions": (gguf_bytes(tensors=[("a", (1,) * 9, 0, 0)]), "has 9 dimensions"),
    "half a block": (gguf_bytes(tensors=[("a", (250, 2), 12, 0)]), "250 columns in blocks of 256 (q4_k)"),
    "odd alignment": (gguf_bytes([("general.alignment", U32, 24)]), "general.alignment is 24"),
    "no alignment": (gguf_bytes([("general.alignment", U32, 0)]), "general.alignment is 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_what_cannot_be_is_refused_by_name(case: str, tmp_path: Path) -> None:
    raw, message = HOSTILE[case]
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path / "m.gguf", raw)
    line = one_line(caught)
    assert message in line
    assert "m.gguf" in line
    assert "download it again" in line


@pytest.mark.parametrize(("number", "name"), [(40, "NVFP4"), (99, "99")])
def test_a_type_that_is_not_read_is_named_with_the_known_ones(number: int, name: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        read(tmp_path / "m.gguf", gguf_bytes(tensors=[("a", (256, 2), number, 0)]))
    assert f"'a' is of GGUF type {name}, which is not read yet; known: F32, F16, BF16, Q4_0" in one_line(caught)


def test_an_architecture_that_is_not_read_is_named_with_the_known_ones(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes([("general.architecture", TEXT, "rwkv7")]))
    with pytest.raises(UnsupportedModelError, match=r"'rwkv7', which is not read yet \(known: llama, qwen2moe"):
        read_config(path)


# What makes a config: key without the architecture, type, value.
FACTS = {
    "block_count": (U32, 2), "expert_count": (U32, 4), "expert_used_count": (U32, 2), "embedding_length": (U32, 64),
    "attention.head_count": (U32, 4), "context_length": (U32, 128), "attention.layer_norm_rms_epsilon": (F32, 1e-6),
}  # fmt: skip
MODEL = [
    ("token_embd.weight", (64, 8), 0, 0), ("blk.0.ffn_gate_exps.weight", (64, 32, 4), 0, 2048),
    ("blk.1.ffn_gate_exps.weight", (64, 32, 4), 0, 34816),
]  # fmt: skip


def model_bytes(facts: dict[str, tuple[int, Any]], architecture: str = "qwen3moe") -> bytes:
    pairs = [(f"{architecture}.{key}", kind, item) for key, (kind, item) in facts.items()]
    return gguf_bytes([("general.architecture", TEXT, architecture), *pairs], MODEL, data_bytes=67584)


def test_metadata_that_make_a_config(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(model_bytes(FACTS))
    config = read_config(path)
    assert (config["num_hidden_layers"], config["num_experts"], config["head_dim"]) == (2, 4, 16)
    assert (config["vocab_size"], config["moe_intermediate_size"]) == (8, 32)


@pytest.mark.parametrize(
    ("key", "fact", "message"),
    [
        ("embedding_length", None, "embedding_length None; a whole number is needed"),
        ("embedding_length", (TEXT, "wide"), "embedding_length 'wide'"),
        ("embedding_length", (U64, 1 << 60), "embedding_length 1152921504606846976"),
        (
            "embedding_length",
            (U32, 32),
            "embedding_length 32, its token_embd.weight has 64 columns; get another conversion of",
        ),
        ("block_count", (U32, 0), "block_count 0; at least 1 is needed"),
        ("block_count", (U32, (1 << 32) - 1), "block_count 4294967295, and has no tensors of layer 2"),
        ("block_count", (U32, 1), "block_count 1, and has tensors of layer 1, which is no head for further tokens"),
        ("expert_count", (U32, 3), "expert_count 3, its tensors hold 4"),
        ("expert_used_count", (U32, 0), "expert_used_count 0; at least 1 is needed"),
        ("expert_used_count", (U32, 5), "expert_used_count 5, there are 4 experts"),
        ("attention.head_count", (U32, 0), "attention.head_count 0; at least 1 is needed"),
        ("attention.head_count", (LIST, (U32, [4, 2])), "attention.head_count [4, 2]; a whole number is needed"),
        ("attention.layer_norm_rms_epsilon", (F32, 0.0), "layer_norm_rms_epsilon 0.0; a number above 0 is needed"),
        ("rope.freq_base", (F32, float("nan")), "rope.freq_base nan; a number is needed"),
    ],
)
def test_metadata_that_lie_are_refused(key: str, fact: tuple[int, Any] | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    facts = {**FACTS, key: fact}
    path.write_bytes(model_bytes({name: found for name, found in facts.items() if found is not None}))
    with pytest.raises(CheckpointError) as caught:
        read_config(path)
    assert message in one_line(caught)


def test_metadata_that_transformers_refuses(tmp_path: Path) -> None:
    """By an error of the hub's, which is no ValueError."""
    path = tmp_path / "m.gguf"
    latent = {
        "attention.head_count": (U32, 3), "rope.dimension_count": (U32, 4), "attention.key_length": (U32, 8),
        "attention.value_length": (U32, 8), "attention.kv_lora_rank": (U32, 8), "expert_shared_count": (U32, 1),
    }  # fmt: skip
    path.write_bytes(model_bytes(FACTS | latent, "deepseek2"))
    with pytest.raises(CheckpointError) as caught:
        read_model_config(path, trust_remote_code=False)
    message = one_line(caught)
    assert "m.gguf has metadata that make no deepseek_v2" in message
    assert "not a multiple of the number of attention heads (3)" in message


def test_a_file_without_an_architecture_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes([]))
    with pytest.raises(CheckpointError, match=r"has no general\.architecture"):
        read_config(path)


def test_a_dense_model_is_told_what_to_use(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    facts = {key: fact for key, fact in FACTS.items() if not key.startswith("expert")}
    path.write_bytes(model_bytes(facts, "llama"))
    with pytest.raises(UnsupportedModelError, match=r"dense model \(llama\).* use transformers or llama\.cpp"):
        read_config(path)


def test_parts_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    first, second = (tmp_path / f"m-0000{number}-of-00002.gguf" for number in (1, 2))
    for path in (first, second):
        path.write_bytes(model_bytes(FACTS))
    with pytest.raises(
        CheckpointError,
        match=r"'blk\.0\.ffn_gate_exps\.weight' is in two parts of .*; they are of two models, or one was renamed",
    ):
        read_config(first)
    alone = tmp_path / "renamed.gguf"
    alone.write_bytes(gguf_bytes([*PAIRS, ("split.tensors.count", U32, 5)]))
    with pytest.raises(CheckpointError, match="says 5 tensors in all its parts, there are 2; parts are missing"):
        read_config(alone)


def test_a_folder_with_one_gguf_file_is_that_model(tmp_path: Path) -> None:
    (tmp_path / "model-q4.gguf").write_bytes(b"")
    assert locate_model(tmp_path) == tmp_path / "model-q4.gguf"
    (tmp_path / "model-q8.gguf").write_bytes(b"")
    with pytest.raises(OffmoeError, match=r"has 2 GGUF models; name one: model-q4.gguf, model-q8.gguf"):
        locate_model(tmp_path)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 255)), min_size=1, max_size=6), st.integers(0, 400))
def test_any_damage_is_either_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]], cut: int
) -> None:
    raw = bytearray(gguf_bytes([*PAIRS, ("list", LIST, (TEXT, ["one", "two"]))]))
    for at, byte in changes:
        raw[at] = byte
    damaged = bytes(raw[: len(raw) - cut])
    try:
        header = read(tmp_path_factory.getbasetemp() / "damaged.gguf", damaged)
    except (CheckpointError, UnsupportedModelError) as error:
        assert str(error).isprintable()
        return
    ends = [tensor.entry.start + tensor.entry.num_bytes for tensor in header.tensors.values()]
    assert max(ends, default=0) <= len(damaged)
