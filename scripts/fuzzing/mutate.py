"""Mutations of an input: of a JSON document as a tree of values, of text by pieces, of anything by bytes.

Every choice comes from the `random.Random` that is given, so a seed names a run.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Sequence
from typing import Any

# Numbers at which sizes, counts and offsets go wrong.
_NUMBERS: tuple[Any, ...] = (
    0, 1, -1, 2, 3, 7, 8, 31, 32, 33, 127, 128, 255, 256, 4096, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53,
    2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, 10**400, 0.0, -0.0, 0.5, 1e-40, 1e308, -1e308, float("inf"),
    float("-inf"), float("nan"),
)  # fmt: skip
_OTHERS: tuple[Any, ...] = (
    None, True, False, "", "x", "0", "-1", "\x00", "\n", "a\nb", "\ud800", "é" * 40, "x" * 5000, "../x", "/", ".", "..",
    "x.safetensors", [], [[]], {}, [0], [-1], [None], {"": None}, {"a": {"a": {}}},
)  # fmt: skip
_MOST_CHANGES = 4
_MOST_DEPTH = 40


def mutate_json(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """Change some values of a JSON document; where it is none, or by chance, its bytes. Parts come from `others`."""
    if rng.random() < 0.1:
        return mutate_bytes(data, rng, others)
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return mutate_bytes(data, rng, others)
    try:
        for _ in range(rng.randint(1, _MOST_CHANGES)):
            tree = _change(tree, rng, others)
        return json.dumps(tree).encode()
    except (ValueError, RecursionError):
        return data


def mutate_parts(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """Change one of a document's parts, each as likely as the others: a long one does not take all changes.

    By values alone, a config of 40 values beside a header of 100 was changed in one input of eight.
    """
    tree = _object(data)
    if not tree or rng.random() < 0.2:
        return mutate_json(data, rng, others)
    name = rng.choice(sorted(tree))
    parts = [json.dumps(other[name]).encode() for other in map(_object, others) if name in other]
    try:
        tree[name] = json.loads(mutate_json(json.dumps(tree[name]).encode(), rng, parts))
        return json.dumps(tree).encode()
    except (ValueError, RecursionError):
        return data


def _object(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def mutate_text(data: bytes, rng: random.Random, others: Sequence[bytes], words: Sequence[str] = ()) -> bytes:
    """Put words in, take pieces out, double them, and splice two inputs."""
    text = data.decode("utf-8", errors="replace")
    for _ in range(rng.randint(1, _MOST_CHANGES)):
        begin, end = sorted((rng.randint(0, len(text)), rng.randint(0, len(text))))
        end = min(end, begin + rng.choice((1, 4, 16, 64)))
        match rng.randrange(4 if words else 3):
            case 0:
                text = text[:begin] + text[end:]
            case 1:
                text = text[:end] + text[begin:end] * rng.choice((1, 1, 2, 50)) + text[end:]
            case 2:
                other = rng.choice(others).decode("utf-8", errors="replace") if others else text
                at = rng.randint(0, len(other))
                text = text[:begin] + other[at : at + rng.choice((8, 64, 512))] + text[end:]
            case _:
                text = text[:begin] + rng.choice(words) + text[rng.choice((begin, end)) :]
    return text.encode("utf-8", errors="replace")


def mutate_bytes(data: bytes, rng: random.Random, others: Sequence[bytes]) -> bytes:
    """Flip bits, write numbers, cut, double and splice."""
    raw = bytearray(data)
    for _ in range(rng.randint(1, _MOST_CHANGES)):
        at = rng.randint(0, len(raw))
        match rng.randrange(6):
            case 0 if raw:
                raw[min(at, len(raw) - 1)] ^= 1 << rng.randrange(8)
            case 1:
                size = rng.choice((1, 2, 4, 8))
                number = rng.choice([n for n in _NUMBERS if type(n) is int]) % (1 << 8 * size)
                raw[at : at + size] = number.to_bytes(size, "little")
            case 2:
                del raw[at : at + rng.choice((1, 8, 64, len(raw)))]
            case 3:
                raw[at:at] = raw[at : at + rng.choice((1, 8, 64))]
            case 4 if others:
                other = rng.choice(others)
                begin = rng.randint(0, len(other))
                raw[at : at + rng.choice((0, 64))] = other[begin : begin + 64]
            case _:
                raw[at:at] = bytes(rng.choice((0, 255, rng.randrange(256))) for _ in range(rng.choice((1, 4, 8))))
    return bytes(raw)


def _change(tree: Any, rng: random.Random, others: Sequence[bytes]) -> Any:
    """One change somewhere in `tree`, which is changed in place where it can be."""
    places: list[tuple[Any, Any]] = []
    _places(tree, places, 0)
    if not places:
        return _value(rng)
    parent, key = rng.choice(places)
    old = parent[key]
    match rng.randrange(10):
        case 0:
            del parent[key]
        case 1 if isinstance(parent, list):
            parent.insert(key, copy.deepcopy(old))
        case 1:
            parent[rng.choice((f"{key}x", str(key)[:-1], str(key).upper(), *parent))] = copy.deepcopy(old)
        case 2:  # what stands elsewhere
            other, name = rng.choice(places)
            parent[key] = copy.deepcopy(other[name])
        case 3 if others:  # what stands in another input, under the same name if it can be
            parent[key] = _borrow(rng.choice(others), key, rng)
        case 4 if isinstance(old, int) and not isinstance(old, bool):
            parent[key] = old + rng.choice((-1, 1, 2, -old * 2, old, 1 << 32))
        case 5 if isinstance(old, str) and old:
            parent[key] = mutate_text(old.encode("utf-8", "replace"), rng, ()).decode("utf-8", "replace")
        case 6:
            parent[key] = [old] if rng.random() < 0.5 else {str(key): old}
        case 7:
            deep: Any = old
            for _ in range(rng.choice((3, 30, 300))):
                deep = [deep]
            parent[key] = deep
        case _:
            parent[key] = _value(rng)
    return tree


def _places(tree: Any, places: list[tuple[Any, Any]], depth: int) -> None:
    if depth > _MOST_DEPTH:
        return
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(items):
        places.append((tree, key))
        _places(value, places, depth + 1)


def _borrow(data: bytes, key: Any, rng: random.Random) -> Any:
    places: list[tuple[Any, Any]] = []
    try:
        _places(json.loads(data), places, 0)
    except (ValueError, RecursionError):
        return _value(rng)
    if not places:
        return _value(rng)
    parent, name = rng.choice([place for place in places if place[1] == key] or places)
    return parent[name]


def _value(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice(_NUMBERS if rng.random() < 0.6 else _OTHERS))
