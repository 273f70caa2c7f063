"""Sizes as people write them: `4.0GB` is 10^9 bytes each, `2GiB` is 2^30 each."""

from __future__ import annotations

import re

from benchlib.errors import ScriptError

UNITS = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip


def parse_bytes(text: str) -> int:
    """Bytes in `text`, such as `500MB` or `2.5GiB`. Raises `ScriptError` for anything else."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in UNITS:
        raise ScriptError(f"{text!r} is not a size; write it like 500MB, 4.0GB or 2GiB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def format_gb(num_bytes: int) -> str:
    """`num_bytes` in units of 10^9, such as `7.53 GB`; in units of 10^6 below one."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"
