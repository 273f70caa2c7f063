"""Sizes, rates and times as people write them. The only module that formats numbers with units."""

from __future__ import annotations

import re

from offmoe.core.errors import UsageError

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

_FACTORS = {
    "": 1, "b": 1,
    "k": 10**3, "kb": 10**3, "kib": KIB,
    "m": 10**6, "mb": 10**6, "mib": MIB,
    "g": 10**9, "gb": 10**9, "gib": GIB,
    "t": 10**12, "tb": 10**12, "tib": 1 << 40,
}  # fmt: skip
_SIZE = re.compile(r"^\s*([0-9]{1,18}(?:\.[0-9]*)?)\s*([a-z]*)\s*$", re.IGNORECASE)


def parse_size(text: str | int, *, name: str = "size") -> int:
    """Bytes in `text`: an int is bytes; "6GiB" is binary, "6GB" and "6g" are decimal.

    Raises UsageError naming the option (`name`) when the text is no size.
    """
    if isinstance(text, bool) or not isinstance(text, (str, int)):
        raise UsageError(f'{name} is {text!r}, not a size; write it like "6GiB" or "6GB"')
    if isinstance(text, int):
        if text < 0:
            raise UsageError(f"{name} is {text} bytes; a size cannot be negative")
        return text
    match = _SIZE.match(text)
    factor = _FACTORS.get(match.group(2).lower()) if match else None
    if match is None or factor is None:
        raise UsageError(f'{name} is {text!r}, not a size; write it like "6GiB" or "6GB"')
    return int(float(match.group(1)) * factor)


def format_bytes(num_bytes: float) -> str:
    """Capacity in binary units: 1.50 GiB, 312.0 MiB, 9 B."""
    for limit, unit, digits in ((GIB, "GiB", 2), (MIB, "MiB", 1), (KIB, "KiB", 1)):
        if abs(num_bytes) >= limit:
            return f"{num_bytes / limit:.{digits}f} {unit}"
    return f"{num_bytes:.0f} B"


def format_bandwidth(bytes_per_s: float) -> str:
    """Bandwidth in decimal units: 1.20 GB/s, 85.0 MB/s."""
    if bytes_per_s >= 1e9:
        return f"{bytes_per_s / 1e9:.2f} GB/s"
    return f"{bytes_per_s / 1e6:.1f} MB/s"


def format_traffic(num_bytes: float) -> str:
    """Bytes moved, in decimal units so that they divide by GB/s: 70.2 MB, 1.31 GB."""
    if num_bytes >= 1e9:
        return f"{num_bytes / 1e9:.2f} GB"
    if num_bytes >= 1e6:
        return f"{num_bytes / 1e6:.1f} MB"
    return f"{num_bytes / 1e3:.1f} kB"


def format_seconds(seconds: float) -> str:
    """A duration: 85 ms, 3.2 s, 4 min 05 s."""
    if seconds < 1:
        return f"{seconds * 1e3:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


def format_percent(share: float) -> str:
    """A share of one as a percentage: 84.2%."""
    return f"{share * 100:.1f}%"
