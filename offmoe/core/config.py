"""Options that the user may set, checked. The same names in Python, on the command line and in JSON output."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeAlias, get_args

from offmoe.core.errors import UsageError
from offmoe.core.units import MIB, parse_size

Size: TypeAlias = str | int  # "6GiB" or bytes; "auto"
Count: TypeAlias = int | Literal["auto"]
EvictionPolicy: TypeAlias = Literal["auto", "lru", "lfru", "decayed"]
IoMode: TypeAlias = Literal["auto", "direct", "buffered"]
MissMode: TypeAlias = Literal["auto", "stream", "cpu"]
PrefetchDistance: TypeAlias = Literal["auto", "off", 1, 2, 3]
CompileMode: TypeAlias = Literal["auto", "off", "on"]
PackMode: TypeAlias = Literal["auto", "off", "on"]


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Settings of an engine; None means "auto". See `make_config` for what each accepts.

    ram                 bytes that the process may grow by: libraries, expert slots in RAM; without a device also
                        resident weights, KV cache and workspace
    vram                bytes of the device: resident weights, KV cache, workspace, expert slots there
    context_length      tokens of prompt plus reply that memory is set aside for
    expert_slots        expert slots where experts are computed, instead of what `vram` (or `ram`) leaves room for
    prefill_chunk       prompt tokens that go through the model at once
    kept_prompts        bytes of `ram` for prompts that were read, so that they are not read again; 0: none
    prompt_cache        folder where they are kept from run to run
    prompt_cache_size   bytes that the folder may have; by default 16 GiB
    policy              who is evicted: "auto", "lru", "lfru" or "decayed"
    warm_start          count experts' uses from run to run, in a small file in the user's cache folder
    io                  "auto" (direct where possible), "direct" or "buffered"
    device              "auto" (CUDA where there is one), "cpu", "cuda" or "cuda:N"
    miss                an expert that is not on the device is copied there ("stream"), computed in RAM ("cpu"), or
                        whichever is measured to be faster ("auto")
    prefetch            "auto", "off", or how many layers ahead experts are fetched: 1 to 3
    compile             compile the model's resident part: "auto", "off" or "on"
    pack                keep bfloat16 weights in 12 bits in RAM, without loss: "auto" (where it is faster), "off", "on"
    placement_invariant compute every expert in one place, so that rounding does not depend on what was cached where
    trust_remote_code   run model code that comes with the checkpoint
    revision            branch, tag or commit of a model on the hub, instead of its main branch
    """

    ram: int | None = None
    vram: int | None = None
    context_length: int | None = None
    expert_slots: int | None = None
    prefill_chunk: int | None = None
    kept_prompts: int | None = None
    prompt_cache: str | None = None
    prompt_cache_size: int | None = None
    policy: EvictionPolicy = "auto"
    warm_start: bool = True
    io: IoMode = "auto"
    device: str = "auto"
    miss: MissMode = "auto"
    prefetch: PrefetchDistance = "auto"
    compile: CompileMode = "auto"
    pack: PackMode = "auto"
    placement_invariant: bool = False
    trust_remote_code: bool = False
    revision: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Name to value, for JSON."""
        return asdict(self)


OPTION_NAMES = tuple(field.name for field in fields(EngineConfig))
MAX_PREFETCH_DISTANCE = 3
_SIZES = ("ram", "vram", "kept_prompts", "prompt_cache_size")
_COUNTS = ("context_length", "expert_slots", "prefill_chunk")
_SWITCHES = ("warm_start", "placement_invariant", "trust_remote_code")
_CHOICES: dict[str, tuple[str, ...]] = {
    "policy": get_args(EvictionPolicy), "io": get_args(IoMode), "miss": get_args(MissMode),
    "compile": get_args(CompileMode), "pack": get_args(PackMode),
}  # fmt: skip
_REVISION = re.compile(r"[\w.][\w./-]{0,199}")
# Options and choices of earlier versions, and what to do without them.
_GONE = {
    "fast_activations": "it was not faster; leave it out, products are exact",
    "policy s3fifo": "it read up to 21% more than lfru or decayed; use lfru, decayed or auto",
    "policy static": "it read up to 69% more than lfru or decayed; use lfru, decayed or auto",
}
_DEVICE = re.compile(r"cpu|cuda(:[0-9]{1,3})?")


def make_config(**options: Any) -> EngineConfig:
    """Check options as a user writes them. Raises UsageError naming the option and what it accepts.

    Sizes are "6GiB", "6GB" or bytes; counts are whole numbers; "auto" or None leaves the choice to offmoe.
    """
    refuse_unknown(options, OPTION_NAMES)
    values = {name: value for name, value in options.items() if value is not None and value != "auto"}
    for name in _SIZES:
        if name in values:
            values[name] = _size(name, values[name])
    if "prompt_cache" in values:
        values["prompt_cache"] = _folder("prompt_cache", values["prompt_cache"])
    elif "prompt_cache_size" in values:
        raise UsageError("prompt_cache_size is set without a folder; use prompt_cache (--prompt-cache DIR), too")
    for name in _COUNTS:
        if name in values:
            values[name] = _count(name, values[name])
    for name, choices in _CHOICES.items():
        if name in values and values[name] not in choices:
            known = f"{name} is {values[name]!r}; known: {', '.join(choices)}"
            raise UsageError(gone(f"{name} {values[name]}") or known)
    for name in _SWITCHES:
        if not isinstance(values.get(name, False), bool):
            raise UsageError(f"{name} is {values[name]!r}; use True or False")
    if "prefetch" in values:
        values["prefetch"] = _distance(values["prefetch"])
    if (revision := values.get("revision")) is not None and not _is_revision(revision):
        raise UsageError(f"revision is {revision!r}; use a branch, tag or commit of the model on the hub")
    _check_device(values)
    return EngineConfig(**values)


def _size(name: str, value: Any) -> int:
    """Bytes. A bare number that is less than a megabyte was meant in another unit."""
    if name == "kept_prompts" and value in {"off", "0"}:
        return 0
    num_bytes = parse_size(value, name=name)
    if 0 < num_bytes < MIB and (isinstance(value, int) or value.strip().isdigit()):
        raise UsageError(f'{name} is {num_bytes} bytes, which nothing fits in; write a unit: "{num_bytes}GiB"')
    return num_bytes


def _folder(name: str, value: Any) -> str:
    try:
        path = os.fspath(value)
    except TypeError:
        path = b""
    if not isinstance(path, str) or not path or "\0" in path:
        raise UsageError(f"{name} is {value!r}; use the path of a folder")
    return path


def _is_revision(value: Any) -> bool:
    return isinstance(value, str) and _REVISION.fullmatch(value) is not None and ".." not in value


def _distance(value: Any) -> str | int:
    if value == "off":
        return "off"
    for distance in range(1, MAX_PREFETCH_DISTANCE + 1):
        if not isinstance(value, bool) and value in (distance, str(distance)):
            return distance
    raise UsageError(f"prefetch is {value!r}; known: auto, off, or how many layers ahead: 1 to {MAX_PREFETCH_DISTANCE}")


def _check_device(values: dict[str, Any]) -> None:
    device = values.get("device", "auto")
    if device != "auto" and not (isinstance(device, str) and _DEVICE.fullmatch(device)):
        raise UsageError(f"device is {device!r}; known: auto, cpu, cuda, cuda:N")
    if device == "cpu" and "vram" in values:
        raise UsageError("vram is set and device is cpu, which has none; leave out one of the two")


def gone(name: str) -> str | None:
    """A line about an option, or an option and its choice, of an earlier version; None for any other."""
    return f"{name} is gone: {_GONE[name]}" if name in _GONE else None


def refuse_unknown(given: Iterable[str], known: Sequence[str]) -> None:
    """Raise UsageError for the first name that is not known, with the nearest and all that are."""
    for name in given:
        if name not in known:
            if (why := gone(name)) is not None:
                raise UsageError(why)
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ";"
            raise UsageError(f"unknown option {name!r}{hint} known: {', '.join(known)}")


def _count(name: str, value: Any) -> int:
    try:
        if isinstance(value, bool) or int(value) != float(value) or int(value) < 1:
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise UsageError(f'{name} is {value!r}; use a whole number of at least 1, or "auto"') from None
    return int(value)
