"""Everything that is fuzzed: how an input becomes files, what is then called, and how inputs are varied.

Many inputs are not the bytes of a file but a JSON document that says what to write, so that a mutation changes a shape
or a count and leaves lengths around it whole; `flips` then damage single bytes of what was written.
"""

from __future__ import annotations

import functools
import io
import json
import random
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuzzing.mutate import mutate_bytes, mutate_json, mutate_parts, mutate_text
from offmoe.checkpoint.header import read_header
from offmoe.checkpoint.index import INDEX_NAME, CheckpointIndex, read_config
from offmoe.checkpoint.locate import demo_model_folder

SEEDS = Path(__file__).parents[2] / "tests" / "faults" / "fuzz_seeds"
_MOST_FILE_BYTES = 1 << 20
Mutate = Callable[[bytes, random.Random, Sequence[bytes]], bytes]


@dataclass(frozen=True, kw_only=True)
class Target:
    """`read(data, folder)` does with an input what offmoe would; `folder` is empty before."""

    name: str
    read: Callable[[bytes, Path], None]
    mutate: Mutate

    def seeds(self) -> list[Path]:
        """The committed inputs, by name."""
        return sorted((SEEDS / self.name).iterdir())


def _document(data: bytes) -> dict[str, Any]:
    """The input as a JSON object; an empty one where it is none, which is then of no use."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _flipped(raw: bytes, flips: Any) -> bytes:
    """`raw` with the bytes that `flips` names: [place, value], ..."""
    changed = bytearray(raw)
    for flip in flips if isinstance(flips, list) else ():
        if isinstance(flip, list) and len(flip) == 2 and all(type(item) is int for item in flip) and changed:
            changed[flip[0] % len(changed)] = flip[1] % 256
    return bytes(changed)


def _small(value: Any, most: int = _MOST_FILE_BYTES) -> int:
    return min(max(value, 0), most) if type(value) is int else 0


# ---- safetensors: {"header": ..., "data": bytes behind it, "flips": ...}


def _safetensors_bytes(case: dict[str, Any]) -> bytes:
    raw = json.dumps(case.get("header")).encode()
    length = case.get("length", len(raw))
    length = length % (1 << 64) if type(length) is int else len(raw)
    return _flipped(length.to_bytes(8, "little") + raw + bytes(_small(case.get("data"))), case.get("flips"))


def _read_safetensors(data: bytes, folder: Path) -> None:
    raw = _safetensors_bytes(_document(data))
    read_header(io.BytesIO(raw), file_name="x.safetensors", file_bytes=len(raw), file_idx=0)


# ---- the index file: its own bytes, beside two shards


def _write_shard(path: Path, names: Sequence[str]) -> None:
    tensors = {n: {"dtype": "F32", "shape": [2], "data_offsets": [8 * i, 8 * i + 8]} for i, n in enumerate(names)}
    path.write_bytes(_safetensors_bytes({"header": tensors, "data": 8 * len(names)}))


def _read_index(data: bytes, folder: Path) -> None:
    (folder / INDEX_NAME).write_bytes(data)
    _write_shard(folder / "a.safetensors", ("a.0", "a.1"))
    _write_shard(folder / "b.safetensors", ("b.0", "b.1"))
    CheckpointIndex.open(folder).close()


# ---- a checkpoint from its headers: {"config": ..., "tensors": {name: [type, shape]}, "flips": ...}


def _write_checkpoint(case: dict[str, Any], folder: Path) -> None:
    """config.json, and a file with tensors of those types and shapes that holds nothing but holes."""
    from offmoe.checkpoint.tensor_entry import ITEM_BITS

    header: dict[str, Any] = {}
    end = 0
    tensors = case.get("tensors")
    for name, given in (tensors if isinstance(tensors, dict) else {}).items():
        dtype, shape = given if isinstance(given, list) and len(given) == 2 else (given, [1])
        num_bytes = ITEM_BITS.get(dtype, 8) if isinstance(dtype, str) else 8
        for size in shape if isinstance(shape, list) else ():
            num_bytes *= size if type(size) is int and 0 <= size < 1 << 40 else 1
        num_bytes //= 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + num_bytes]}
        end += num_bytes
    raw = _flipped(_safetensors_bytes({"header": header}), case.get("flips"))
    with (folder / "model.safetensors").open("wb") as file:
        file.write(raw)
        file.truncate(len(raw) + min(end, 1 << 40))
    (folder / "config.json").write_text(json.dumps(case.get("config")), encoding="utf-8")


def _describe(path: Path) -> None:
    """Read a checkpoint as `inspect` and `plan` do."""
    from offmoe.planner.inspect import inspect_checkpoint
    from offmoe.planner.model_facts import read_facts

    inspect_checkpoint(path)
    read_facts(path, direct=True)


def _read_checkpoint(data: bytes, folder: Path) -> None:
    _write_checkpoint(_document(data), folder)
    _describe(folder)


def _read_model(data: bytes, folder: Path) -> None:
    """Load a model without its weights, its sampling rules, and the bytes of every expert."""
    case = _document(data)
    _write_checkpoint(case, folder)
    if "generation_config" in case:
        text = json.dumps(case["generation_config"])
        (folder / "generation_config.json").write_text(text, encoding="utf-8")
    _build(folder)


def _build(path: Path) -> None:
    from offmoe.hf.expert_map import map_experts
    from offmoe.hf.internals import KeyMapping
    from offmoe.loader.build import build_on_meta, read_model_config
    from offmoe.sampling.sampler import resolve_sampling

    config, quantisation = read_model_config(path, trust_remote_code=False)
    index = CheckpointIndex.open(path, quantisation)
    try:
        model = build_on_meta(config, index, trust_remote_code=False)
        mapping = KeyMapping(model)
        map_experts(model, index, mapping, mapping.targets(index.tensors))
        resolve_sampling(model.generation_config)
    finally:
        index.close()


# ---- GGUF: {"version", "counts", "pairs": [[key, type, value]], "tensors": [[name, sizes, type, offset]], ...}

_FORMS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}


def _gguf_value(kind: Any, value: Any) -> bytes:
    if kind == 8:
        raw = str(value).encode("utf-8", errors="replace")
        return struct.pack("<Q", len(raw)) + raw
    if kind == 9:
        item_kind, items = value if isinstance(value, list) and len(value) == 2 else (4, [])
        items = items if isinstance(items, list) else [items]
        item_kind = item_kind if type(item_kind) is int else 4
        return struct.pack("<IQ", item_kind % (1 << 32), len(items)) + b"".join(
            _gguf_value(item_kind, i) for i in items
        )
    form = _FORMS.get(kind, "<I") if isinstance(kind, int) else "<I"
    try:
        return struct.pack(form, value)
    except (struct.error, OverflowError, TypeError, ValueError):
        return bytes(struct.calcsize(form))


def _uint(value: Any, bits: int) -> bytes:
    return ((value if type(value) is int else 0) % (1 << bits)).to_bytes(bits // 8, "little")


def _gguf_bytes(case: dict[str, Any]) -> bytes:
    pairs = [p for p in _list(case.get("pairs")) if isinstance(p, list) and len(p) == 3]
    tensors = [t for t in _list(case.get("tensors")) if isinstance(t, list) and len(t) == 4]
    counts = _list(case.get("counts"))
    num_tensors, num_pairs = counts if len(counts) == 2 else (len(tensors), len(pairs))
    head = b"GGUF" + _uint(case.get("version", 3), 32) + _uint(num_tensors, 64) + _uint(num_pairs, 64)
    for key, kind, value in pairs:
        head += _gguf_value(8, key) + _uint(kind, 32) + _gguf_value(kind, value)
    for name, sizes, kind, offset in tensors:
        head += _gguf_value(8, name) + _uint(len(_list(sizes)), 32)
        head += b"".join(_uint(size, 64) for size in _list(sizes)) + _uint(kind, 32) + _uint(offset, 64)
    return _flipped(head + bytes(-len(head) % 32), case.get("flips"))


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _write_gguf(case: dict[str, Any], folder: Path) -> Path:
    path = folder / "m.gguf"
    raw = _gguf_bytes(case)
    with path.open("wb") as file:
        file.write(raw)
        file.truncate(len(raw) + _small(case.get("data"), 1 << 40))
    return path


def _read_gguf(data: bytes, folder: Path) -> None:
    path = _write_gguf(_document(data), folder)
    read_config(path)
    _describe(path)


def _read_gguf_bytes(data: bytes, folder: Path) -> None:
    path = folder / "m.gguf"
    with path.open("wb") as file:
        file.write(data)
        file.truncate(len(data) + (1 << 26))  # the tensors that a header speaks of
    _describe(path)


def _read_gguf_model(data: bytes, folder: Path) -> None:
    _build(_write_gguf(_document(data), folder))


# ---- tokenizers: {file name: its contents, as JSON or text}


def _write_files(case: dict[str, Any], folder: Path) -> None:
    for name, contents in case.items():
        if Path(name).name == name and name.isprintable() and 0 < len(name.encode()) < 100:
            text = contents if isinstance(contents, str) else json.dumps(contents)
            (folder / name).write_text(text, encoding="utf-8", errors="replace")


MESSAGES = [
    {"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi <|im_end|> there"},
    {"role": "assistant", "content": ""}, {"role": "user", "content": "one\n{{ 2 }}"},
]  # fmt: skip


def _use_tokenizer(tokenizer: Any) -> None:
    from offmoe.chat.messages import chat_ids
    from offmoe.engine.prompt import encode_prompt
    from offmoe.engine.text import TextDecoder

    encode_prompt("one 2 three\u00e9 \U0001f600", tokenizer, vocab_size=1 << 20)
    chat_ids(tokenizer, MESSAGES)
    TextDecoder(tokenizer).add(1)


def _read_tokenizer(data: bytes, folder: Path) -> None:
    from offmoe.hf.tokens.tokenizer import load_tokenizer

    _write_files(_document(data), folder)
    tokenizer = load_tokenizer(folder, trust_remote_code=False)
    if tokenizer is not None:
        _use_tokenizer(tokenizer)


def _read_gguf_tokenizer(data: bytes, folder: Path) -> None:
    from offmoe.hf.tokens.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(_write_gguf(_document(data), folder), trust_remote_code=False)
    if tokenizer is not None:
        _use_tokenizer(tokenizer)


@functools.cache
def _demo_tokenizer() -> Any:
    from offmoe.hf.tokens.tokenizer import load_tokenizer

    return load_tokenizer(demo_model_folder(), trust_remote_code=False)


def _read_template(data: bytes, folder: Path) -> None:
    from offmoe.chat.messages import chat_ids

    tokenizer = _demo_tokenizer()
    before = tokenizer.chat_template
    try:
        tokenizer.chat_template = data.decode("utf-8", errors="replace")
        chat_ids(tokenizer, MESSAGES)
        chat_ids(tokenizer, MESSAGES[1:2])
    finally:
        tokenizer.chat_template = before


_WORDS = (
    "{% for m in messages %}", "{% endfor %}", "{% if m.content is string %}", "{% endif %}", "{{ m['content'] }}",
    "{{ messages }}", "{{ bos_token + eos_token }}", "{% set ns = namespace(x=0) %}", "{{ raise_exception('no') }}",
    "{{ strftime_now('%Y') }}", "{{ m.content | tojson }}", "{% generation %}", "{% endgeneration %}", "{{ 1 // 0 }}",
    "{{ 'a' * 10 ** 9 }}", "{{ 2 ** 10 ** 7 }}", "{% for i in range(10 ** 6) %}", "{{ messages[7].content }}",
    "{{ x.y.z }}", "{{ messages | map('upper') | join }}", "{% macro f(x) %}", "{% endmacro %}", "{{ f(f) }}",
    "{% break %}", "{{", "}}", "{%- if tools %}", "{{ ''.__class__.__mro__ }}", "{{ '%d' % 'x' }}",
    "{{ m.content[::-1] }}", "{{ cycler }}", "| list", "| length", "| sort", "| int + none", "{% include 'x' %}",
    "{% import 'x' as y %}", "{{ '%9999999d' % 3 }}", "{{ '{:>9999999}'.format(3) }}", "{{ messages.append(1) }}",
    "{{ ([[]] * 9) | sum }}", "{{ lipsum(99999) }}",
)  # fmt: skip


# ---- a saved conversation: its own bytes


def _read_saved_chat(data: bytes, folder: Path) -> None:
    from offmoe.chat.saved import read_messages

    (folder / "chat.json").write_bytes(data)
    read_messages(folder / "chat.json")


_TARGETS = (
    Target(name="safetensors", read=_read_safetensors, mutate=mutate_json),
    Target(name="index", read=_read_index, mutate=mutate_json),
    Target(name="quantised", read=_read_checkpoint, mutate=mutate_parts),
    Target(name="gguf", read=_read_gguf, mutate=mutate_json),
    Target(name="gguf_bytes", read=_read_gguf_bytes, mutate=mutate_bytes),
    Target(name="gguf_model", read=_read_gguf_model, mutate=mutate_json),
    Target(name="gguf_tokenizer", read=_read_gguf_tokenizer, mutate=mutate_json),
    Target(name="model", read=_read_model, mutate=mutate_parts),
    Target(name="tokenizer", read=_read_tokenizer, mutate=mutate_json),
    Target(name="template", read=_read_template, mutate=functools.partial(mutate_text, words=_WORDS)),
    Target(name="saved_chat", read=_read_saved_chat, mutate=mutate_json),
)
TARGETS = {target.name: target for target in _TARGETS}
