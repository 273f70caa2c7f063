"""The output of `offmoe probe`."""

from __future__ import annotations

from offmoe.core.units import format_bandwidth, format_bytes
from offmoe.machine.record import LayerCosts, MachineRecord


def probe_rows(record: MachineRecord) -> list[tuple[str, str]]:
    """One line a figure."""
    rows = [
        ("RAM", format_bytes(record.ram_bytes)),
        ("cores", str(record.num_cores)),
        ("memory, read", format_bandwidth(record.read_bytes_per_s)),
    ]
    rows += [(f"experts on the CPU, {name}", format_bandwidth(rate)) for name, rate in record.cpu_bytes_per_s.items()]
    rows += [
        ("products on the CPU", f"{record.cpu_flops_per_s / 1e9:.0f} GFLOP/s"),
        ("attention to latents", f"{record.latent_flops_per_s / 1e9:.0f} GFLOP/s, its matrices "
                                 f"{format_bandwidth(record.latent_bytes_per_s)}"),
        ("experts in caches", f"{format_bandwidth(record.cached_bytes_per_s)}, of {format_bytes(record.cache_bytes)}"),
        ("a layer, whatever it reads", _costs(record.layers)),
        ("that in caches", _costs(record.cached_layers)),
        ("a layer while experts are missing", _missing(record.layers)),
        ("that in caches", _missing(record.cached_layers)),
        ("libraries", format_bytes(record.libraries_bytes)),
        ("may be page-locked", "no limit known" if record.pin_quota_bytes is None
         else format_bytes(record.pin_quota_bytes)),
    ]  # fmt: skip
    for drive in record.drives.values():
        rows.append(("drive, direct reads", _rate(drive.direct_bytes_per_s)))
        rows.append(("drive, buffered reads", _rate(drive.buffered_bytes_per_s)))
    if not record.drives:
        rows.append(("drive", "no file to read there; give --model or --path"))
    if record.device_name is None:
        rows.append(("device", "no CUDA device"))
        return rows
    return [
        *rows,
        ("device", f"{record.device_name}, {format_bytes(record.vram_bytes or 0)}"),
        ("device memory", _rate(record.device_bytes_per_s)),
        ("to the device, pinned", _rate(record.link_pinned_bytes_per_s)),
        ("to the device, pageable", _rate(record.link_pageable_bytes_per_s)),
        ("the same beside the CPU", _rate(record.link_beside_cpu_bytes_per_s)),
        ("the CPU beside that", _rate(record.cpu_beside_link_bytes_per_s)),
    ]


def _costs(costs: LayerCosts) -> str:
    return (
        f"{_ms(costs.whole_s)} by the kernels, a token {_ms(costs.whole_token_s)} beside; {_ms(costs.modules_s)} by "
        f"modules, {_ms(costs.token_s)} beside"
    )


def _missing(costs: LayerCosts) -> str:
    return f"{_ms(costs.watched_s)} more, {_ms(costs.fetch_s)} more where one is fetched"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms"


def _rate(bytes_per_s: float | None) -> str:
    return "not possible" if bytes_per_s is None else format_bandwidth(bytes_per_s)
