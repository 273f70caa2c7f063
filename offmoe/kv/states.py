"""Parts of a KV cache taken out and put back: rows of full attention, and the states that a length leaves in the rest.

Rows of full attention stay where they are while a sequence grows. Windows and running states (delta nets, mixers, short
convolutions, indexers) are overwritten, so they are copied at the length that is to be gone back to. Copies are in RAM.
"""

from __future__ import annotations

from typing import Any

import torch

from offmoe.hf.door import DynamicCache
from offmoe.kv.cache import Buffers, PreallocatedLayer, SlidingLayer

# Layer index, or -1 for the cache itself -> what it held.
KeptStates = dict[int, Any]
_OF_CACHE = -1


def is_stateless(layer: Any) -> bool:
    """A layer without keys, values or a state."""
    return type(layer).__name__ == "DummyLayer"  # by name: transformers 5.17 has no such class


def full_layers(cache: DynamicCache) -> list[PreallocatedLayer]:
    """Layers whose rows stay where they are."""
    return [layer for layer in cache.layers if isinstance(layer, PreallocatedLayer)]


def has_states(cache: DynamicCache) -> bool:
    """There is more than rows that stay."""
    return any(not isinstance(layer, PreallocatedLayer) and not is_stateless(layer) for layer in cache.layers)


@torch.inference_mode()
def take_rows(cache: DynamicCache, begin: int, end: int) -> list[Buffers]:
    """Copies of the rows of tokens `begin` to `end`, of every layer of full attention."""
    found = []
    for layer in full_layers(cache):
        assert layer.buffers is not None and layer.get_seq_length() >= end, f"{layer.get_seq_length()=} {end=}"
        keys, values = (_in_ram(buffer[..., begin:end, :]) for buffer in layer.buffers)
        found.append((keys, values))
    return found


@torch.inference_mode()
def put_rows(cache: DynamicCache, begin: int, rows: list[Buffers], *, device: torch.device) -> None:
    """Write rows that `take_rows` gave behind the first `begin`."""
    for layer, states in zip(full_layers(cache), rows, strict=True):
        layer.put(begin, states, device=device)


@torch.inference_mode()
def take_states(cache: DynamicCache, length: int, now: int) -> KeptStates | None:
    """Copies of what the other layers held at `length` tokens, of `now` that were read; None where that is gone."""
    found: KeptStates = {}
    for idx, layer in enumerate(cache.layers):
        if isinstance(layer, PreallocatedLayer) or is_stateless(layer):
            continue
        if isinstance(layer, SlidingLayer):
            rows = layer.rows_at(length)
            if rows is None:
                return None
            found[idx] = (_in_ram(rows[0]), _in_ram(rows[1]))
        elif length != now:
            return None
        else:
            found[idx] = _copied(vars(layer))
    others = {name: value for name, value in vars(cache).items() if name != "layers" and _holds_tensors(value)}
    if others and length != now:
        return None
    return found | ({_OF_CACHE: _copied(others)} if others else {})


@torch.inference_mode()
def put_states(cache: DynamicCache, length: int, states: KeptStates, *, device: torch.device) -> None:
    """Let the other layers hold what they did at `length` tokens."""
    for idx, state in states.items():
        if idx == _OF_CACHE:
            vars(cache).update(_copied(state, device))
            continue
        layer = cache.layers[idx]
        if isinstance(layer, SlidingLayer):
            layer.put(length, state, device=device)
        else:
            vars(layer).update(_copied(state, device))


def num_bytes(value: Any) -> int:
    """Bytes of all tensors in `value`."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(map(num_bytes, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(num_bytes, value))
    return 0


def _holds_tensors(value: Any) -> bool:
    return num_bytes(value) > 0


def _in_ram(states: torch.Tensor) -> torch.Tensor:
    return states.detach().to("cpu", copy=True).contiguous()


def _copied(value: Any, device: torch.device | str = "cpu") -> Any:
    """A copy with its own tensors, on `device`."""
    if isinstance(value, torch.Tensor):
        return value.detach().to(device, copy=True)
    if isinstance(value, dict):
        return {key: _copied(item, device) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copied(item, device) for item in value)
    return value
