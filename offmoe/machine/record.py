"""Record of a machine's measurements, kept between runs: bandwidths, and what the libraries take of its memory.

One file a machine in the user's cache folder, written by `offmoe probe`, read by whatever plans. A file of another
version, or of a machine that has changed, counts as none.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import psutil

from offmoe.core.files import write_whole
from offmoe.core.folders import cache_folder
from offmoe.machine.memory import num_cores

VERSION = 6
# Behind a format's name: its rate where experts do not begin with a cache line.
OFF_LINES = ", off lines"


# Above this share of the processors' time in use, figures are those of a busy machine.
BUSY_SHARE = 0.25


@dataclass(frozen=True, kw_only=True)
class DriveSpeed:
    """Bytes a second of reads as large as an expert, past the page cache and through it; None: not possible there."""

    direct_bytes_per_s: float | None
    buffered_bytes_per_s: float | None
    measured_on: str = ""


@dataclass(frozen=True, kw_only=True)
class LayerCosts:
    """Seconds of a token whatever it reads. A layer: that the kernels compute `whole_s`, or its `modules_s` one by one;
    `whole_token_s` and `token_s` are what comes beside the layers, in a model of the one kind and of the other. A layer
    takes `watched_s` more while not all experts are in memory, and `fetch_s` more, beside the bytes, when it fetches.
    """

    whole_s: float
    whole_token_s: float
    modules_s: float
    token_s: float
    watched_s: float
    fetch_s: float


@dataclass(frozen=True, kw_only=True)
class MachineRecord:
    """Rates in bytes a second. What a machine without a GPU lacks is None.

    read                   RAM, read as a stream
    cpu                    experts computed on the CPU for one token, by format ("bf16", "int4", ...)
    cpu_flops_per_s        the same for many rows
    latent_flops_per_s     one token's attention to latents (DeepSeek's)
    latent_bytes_per_s     the matrices between heads and latents, likewise
    cached_bytes_per_s     experts on the CPU ("bf16") where `cache_bytes`, those of the processor, hold them
    layers, cached_layers  what a token costs whatever it reads, when it reads more than caches hold, and less
    libraries_bytes        what the process grows by before a model's own memory
    link_*                 host to device, from pinned and pageable memory, and beside computing experts
    busy_share             of the processors' time, used by other programs just before the measurement
    pin_quota_bytes        memory that may be page-locked; None: no limit, or not asked
    """

    name: str
    ram_bytes: int
    num_cores: int
    read_bytes_per_s: float
    cpu_bytes_per_s: dict[str, float]
    cpu_flops_per_s: float
    latent_flops_per_s: float
    latent_bytes_per_s: float
    cached_bytes_per_s: float
    cache_bytes: int
    layers: LayerCosts
    cached_layers: LayerCosts
    libraries_bytes: int
    device_name: str | None = None
    vram_bytes: int | None = None
    device_bytes_per_s: float | None = None
    device_layer_s: float | None = None
    link_pinned_bytes_per_s: float | None = None
    link_pageable_bytes_per_s: float | None = None
    link_beside_cpu_bytes_per_s: float | None = None
    cpu_beside_link_bytes_per_s: float | None = None
    pin_quota_bytes: int | None = None
    drives: dict[str, DriveSpeed] = field(default_factory=dict)
    source: str = "measured"
    busy_share: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def cpu_rate(self, kind: str, *, off_lines: bool = False) -> float:
        """Experts of format `kind` on the CPU; of the slowest that was measured where that one was not, packed ones as
        bfloat16. `off_lines`:
        they do not begin with a line of the processor's caches, which counts for some formats.
        """
        rates = self.cpu_bytes_per_s
        known = (off_lines and rates.get(f"{kind}{OFF_LINES}")) or rates.get(kind)
        return known or (kind == "packed" and rates.get("bf16")) or min(rates.values())

    def drive(self, path: Path) -> DriveSpeed | None:
        """Speed of the drive that `path` is on, or of the only one that was measured."""
        found = self.drives.get(drive_key(path))
        if found is None and len(self.drives) == 1:
            return next(iter(self.drives.values()))
        return found


def drive_key(path: Path) -> str:
    """Names the drive that `path` is on."""
    try:
        return f"{path.stat().st_dev:x}"
    except OSError:
        return "unknown"


def fingerprint(device_name: str | None = None) -> str:
    """16 hexadecimal digits that change when processor, memory, cores, system or device do."""
    facts = [platform.machine(), _processor(), psutil.virtual_memory().total >> 28, num_cores(), sys.platform]
    return hashlib.sha256(json.dumps([*facts, device_name]).encode()).hexdigest()[:16]


def record_path() -> Path:
    """The file of this machine."""
    return cache_folder() / f"machine-{fingerprint()}.json"


def read_record(path: Path | None = None) -> MachineRecord | None:
    """Record of an earlier measurement; None when nothing was, or what is there is damaged or of another version."""
    try:
        held = json.loads((path or record_path()).read_text(encoding="utf-8"))
        if held.pop("version") != VERSION:
            return None
        drives = {key: DriveSpeed(**speeds) for key, speeds in held.pop("drives").items()}
        held |= {name: LayerCosts(**held[name]) for name in ("layers", "cached_layers")}
        record = MachineRecord(**held, drives=drives)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return record if _is_sane(record) else None


def write_record(record: MachineRecord, path: Path | None = None) -> str | None:
    """Keep `record`; returns why that was not possible, or None."""
    target = path or record_path()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, json.dumps({"version": VERSION, **record.as_dict()}, indent=1).encode())
    except OSError as error:
        return f"{target.parent}: {error.strerror or error}"
    return None


def _is_sane(record: MachineRecord) -> bool:
    """Every rate a positive number: a file may hold anything."""
    rates = [getattr(record, f.name) for f in fields(record) if f.name.endswith(("_per_s", "_bytes"))]
    flat = [rate for rate in rates if not isinstance(rate, dict) and rate is not None]
    flat += list(record.cpu_bytes_per_s.values()) if isinstance(record.cpu_bytes_per_s, dict) else [-1]
    for drive in record.drives.values():
        flat += [rate for rate in (drive.direct_bytes_per_s, drive.buffered_bytes_per_s) if rate is not None]
    costs = [*asdict(record.layers).values(), *asdict(record.cached_layers).values()]
    # What is not measurable is zero.
    flat += [cost + 1e-9 if isinstance(cost, (int, float)) else -1 for cost in costs]
    is_number = all(isinstance(rate, (int, float)) and not isinstance(rate, bool) and rate > 0 for rate in flat)
    return is_number and bool(record.cpu_bytes_per_s)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
