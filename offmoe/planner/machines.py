"""Machines that `offmoe plan --for` knows without being on them. By published tests and data sheets.

Not measured here. RTX 4060 laptop: PCIe 13 GB/s, CPU experts 65 GB/s, 218 GB/s of its 256 GB/s memory, as offload
engines report for it. The others by arithmetic: 0.85 of the memory bandwidth in NVIDIA's data sheets, pinned copies of
12, 13, 25 or 50 GB/s by PCIe generation and lanes, 0.8 of dual-channel DDR4-3200 (51 GB/s) or DDR5-5600 (90), 0.8 of
drives' data sheets. Integer formats on the CPU count at 0.7 of the plain rate (scripts/bench kernels measured 0.7 to
0.75), what a layer and a token cost whatever they read as on the one server that was measured, a layer's overhead at
0.1 ms on a device, a core at 40 GFLOP/s.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import replace

from offmoe.core.errors import UsageError
from offmoe.core.units import GIB, MIB
from offmoe.machine.record import DriveSpeed, LayerCosts, MachineRecord

_LIBRARIES_BYTES = 1200 * MIB  # with CUDA's own; without a GPU 430 MiB were measured
_LIBRARIES_CPU_BYTES = 440 * MIB


def _machine(
    name: str, *, ram: int, cores: int, ram_rate: float, disk: float, vram: int | None = None, vram_rate: float = 0,
    link: float = 0, source: str = "data sheets and arithmetic",
) -> MachineRecord:  # fmt: skip
    """Sizes in GiB, rates in GB/s. Link and CPU share the RAM's bandwidth."""
    cpu = {kind: ram_rate * share * 1e9 for kind, share in _SHARES.items()}
    both = min(1.0, ram_rate / (ram_rate + link)) if link else 0.0
    record = MachineRecord(
        name=name, ram_bytes=ram * GIB, num_cores=cores, read_bytes_per_s=ram_rate * 1e9, cpu_bytes_per_s=cpu,
        cpu_flops_per_s=cores * 40e9, latent_flops_per_s=40e9, latent_bytes_per_s=8e9,
        cached_bytes_per_s=2 * ram_rate * 1e9, cache_bytes=8 * MIB, layers=_LAYERS,
        cached_layers=_LAYERS, libraries_bytes=_LIBRARIES_CPU_BYTES,
        drives={"": DriveSpeed(direct_bytes_per_s=disk * 1e9, buffered_bytes_per_s=disk * 0.7e9)},
        source=source,
    )  # fmt: skip
    if vram is None:
        return record
    return replace(
        record, libraries_bytes=_LIBRARIES_BYTES, device_name=name, vram_bytes=vram * GIB,
        device_bytes_per_s=vram_rate * 1e9, device_layer_s=0.1e-3, link_pinned_bytes_per_s=link * 1e9,
        link_pageable_bytes_per_s=link * 0.5e9, link_beside_cpu_bytes_per_s=link * both * 1e9,
        cpu_beside_link_bytes_per_s=ram_rate * both * 1e9,
    )  # fmt: skip


# As measured on two cores of a server (benchmarks/2026-11-23-plan.md), which are no faster than a laptop's.
_LAYERS = LayerCosts(
    whole_s=0.04e-3, whole_token_s=0.4e-3, modules_s=0.5e-3, token_s=0.8e-3, watched_s=0.02e-3, fetch_s=0.7e-3
)
_SHARES = {"bf16": 1.0, "bf16 turned": 0.4, "f32": 1.0, "fp8": 0.9, "int8": 0.7, "int4": 0.7, "mxfp4": 0.7}
_KNOWN = (
    _machine(
        "RTX 4060 laptop", ram=32, cores=8, ram_rate=65, disk=3.5, vram=8, vram_rate=218, link=13,
        source="published tests, data sheets and arithmetic",
    ),
    _machine("RTX 3060 12GB desktop", ram=32, cores=6, ram_rate=41, disk=3.0, vram=12, vram_rate=306, link=12),
    _machine("RTX 4070 laptop", ram=32, cores=8, ram_rate=65, disk=4.0, vram=8, vram_rate=218, link=13),
    _machine("RTX 3090 desktop", ram=64, cores=8, ram_rate=41, disk=5.0, vram=24, vram_rate=796, link=25),
    _machine("RTX 4090 desktop", ram=64, cores=16, ram_rate=72, disk=5.5, vram=24, vram_rate=857, link=25),
    _machine("RTX 5090 desktop", ram=96, cores=16, ram_rate=72, disk=8.0, vram=32, vram_rate=1523, link=50),
    _machine("laptop without GPU, 16 GB", ram=16, cores=6, ram_rate=41, disk=2.5),
    _machine("laptop without GPU, 32 GB", ram=32, cores=8, ram_rate=72, disk=3.5),
)  # fmt: skip
_RATES = ("link", "disk", "ram_rate", "vram_rate")
_NUMBERS = ("ram", "vram", "cores", *_RATES)
# "GB" of memory are GiB, as memory is sold.
_NUMBER = re.compile(r"(\d+(?:\.\d+)?)\s*(gib|gb|tib|tb|g|t)?(?:/s)?")
_LARGEST = 1e5
NAMES = tuple(machine.name for machine in _KNOWN)


def find_machine(name: str) -> MachineRecord:
    """The machine called `name`, or described by it: "ram=32GB,vram=8GB,link=13GB/s".

    Names are taken in any case, without blanks, and without "laptop" or "desktop" where one machine is left. Raises
    UsageError with the nearest and all that are known.
    """
    if "=" in name:
        return described_machine(name)
    for machine in _KNOWN:
        if machine.name.lower() == name.strip().lower():
            return machine
    alike = [machine for machine in _KNOWN if _squeezed(name) and _squeezed(name) in _squeezed(machine.name)]
    if len(alike) == 1:
        return alike[0]
    lower = {known.lower(): known for known in NAMES}
    close = difflib.get_close_matches(name.strip().lower(), lower, n=1)
    hint = f"; did you mean {lower[close[0]]!r}?" if close else ";"
    raise UsageError(
        f"--for {name!r} is no machine that is known{hint} known: {', '.join(NAMES)}; "
        'or numbers, such as "ram=32GB,vram=8GB,link=13GB/s"'
    )


def _squeezed(name: str) -> str:
    """A name without blanks, capitals, and the words of the makers."""
    return re.sub(r"nvidia|geforce|[^a-z0-9]", "", name.lower())


def described_machine(text: str) -> MachineRecord:
    """A machine of the numbers in `text`. Raises UsageError.

    What is left out is usual: 8 cores, RAM of dual-channel DDR5, a drive of 3.5 GB/s, and with vram a card of the RTX
    4060's memory on a link of 13 GB/s.
    """
    given: dict[str, float] = {}
    for part in text.split(","):
        key, equals, value = (piece.strip().lower() for piece in part.partition("="))
        if not equals or key not in _NUMBERS:
            raise UsageError(f"--for {text!r}: {part.strip()!r} is none of {', '.join(_NUMBERS)}; use ram=32GB")
        match = _NUMBER.fullmatch(value)
        if match is None or not 0 < float(match[1]) < _LARGEST:
            example = "cores=8" if key == "cores" else f"{key}=13GB/s" if key in _RATES else f"{key}=32GB"
            raise UsageError(f"--for {text!r}: {key} is {value!r}; use a number as in {example}")
        given[key] = float(match[1]) * (1e3 if (match[2] or "").startswith("t") else 1)
    if "ram" not in given:
        raise UsageError(f"--for {text!r} says no ram; use ram=32GB")
    alone = [key for key in ("link", "vram_rate") if key in given and "vram" not in given]
    if alone:
        raise UsageError(f"--for {text!r} has {alone[0]} and no vram; use vram=8GB")
    ram, vram = round(given["ram"]), round(given["vram"]) if "vram" in given else None
    return _machine(
        text, ram=ram, vram=vram, cores=round(given.get("cores", 8)), ram_rate=given.get("ram_rate", 72.0),
        disk=given.get("disk", 3.5), link=given.get("link", 13.0) if vram else 0,
        vram_rate=given.get("vram_rate", 218.0) if vram else 0, source="your numbers, and usual ones",
    )  # fmt: skip
