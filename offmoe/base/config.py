"""What the user may set, checked. The same names in Python, on the command line and in JSON output."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from offmoe.base.errors import UsageError
from offmoe.base.units import parse_size


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Settings of an engine; None means "auto". See `make_config` for what each accepts.

    ram               bytes that the process may grow by: libraries, resident weights, KV cache, workspace, expert slots
    context_length    tokens of prompt plus reply that memory is set aside for
    experts           expert slots, instead of what `ram` leaves room for
    prefill_chunk     prompt tokens that go through the model at once
    policy            who is evicted: "auto" or "lru"
    io                "auto" (direct where possible), "direct" or "buffered"
    device            "auto" or "cpu"
    trust_remote_code run model code that comes with the checkpoint
    """

    ram: int | None = None
    context_length: int | None = None
    experts: int | None = None
    prefill_chunk: int | None = None
    policy: str = "auto"
    io: str = "auto"
    device: str = "auto"
    trust_remote_code: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Name to value, for JSON."""
        return asdict(self)


OPTION_NAMES = tuple(field.name for field in fields(EngineConfig))
_CHOICES = {"policy": ("auto", "lru"), "io": ("auto", "direct", "buffered"), "device": ("auto", "cpu")}


def make_config(**options: Any) -> EngineConfig:
    """Check options as a user writes them. Raises UsageError naming the option and what it accepts.

    Sizes are "6GiB", "6GB" or bytes; counts are whole numbers; "auto" or None leaves the choice to offmoe.
    """
    refuse_unknown(options, OPTION_NAMES)
    values = {name: value for name, value in options.items() if value is not None and value != "auto"}
    if "ram" in values:
        values["ram"] = parse_size(values["ram"], name="ram")
    for name in ("context_length", "experts", "prefill_chunk"):
        if name in values:
            values[name] = _count(name, values[name])
    for name, choices in _CHOICES.items():
        if name in values and values[name] not in choices:
            raise UsageError(f"{name} is {values[name]!r}; known: {', '.join(choices)}")
    if not isinstance(values.get("trust_remote_code", False), bool):
        raise UsageError(f"trust_remote_code is {values['trust_remote_code']!r}; use True or False")
    return EngineConfig(**values)


def refuse_unknown(given: Iterable[str], known: Sequence[str]) -> None:
    """Raise UsageError for the first name that is not known, with the nearest and all that are."""
    for name in given:
        if name not in known:
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
