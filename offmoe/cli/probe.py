"""`offmoe probe`: what was measured before, or a new measurement that is kept."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import psutil

from offmoe.checkpoint.locate import demo_model_folder, locate_cached
from offmoe.cli.options import process_baseline_bytes
from offmoe.core.errors import UsageError
from offmoe.core.units import format_percent
from offmoe.machine.record import BUSY_SHARE, MachineRecord, drive_key, read_record, write_record
from offmoe.report.progress import ProgressReporter

# How long the processors are watched before anything is measured.
LOOK_S = 0.3


def probe_machine(model: str | None, path: Path | None, *, refresh: bool, quiet: bool) -> MachineRecord:
    """The record of this machine, with the drive of `model` or `path`. Measures what is not known yet."""
    if model is not None and path is not None:
        raise UsageError("give --model or --path, not both")
    if path is not None and not path.exists():
        raise UsageError(f"--path {path} does not exist; give a large file, or a folder with a model")
    where = path or (demo_model_folder() if model is None else locate_cached(model))
    if where is None:
        raise UsageError(
            f"{model} is not in the hub's local cache, and probe reads what is there: give --path, a file on that drive"
        )
    known = None if refresh else read_record()
    if known is not None and drive_key(where) in known.drives:
        return known
    from offmoe.cli.session import hush_libraries
    from offmoe.probe.probe import measure_drive, run_probe

    hush_libraries()
    busy = psutil.cpu_percent(interval=LOOK_S) / 100
    if busy > BUSY_SHARE:
        warnings.warn(
            f"other programs use {format_percent(busy)} of the processors, so the figures will be too low; run "
            "`offmoe probe --refresh` when the machine is quiet", stacklevel=2,
        )  # fmt: skip
    if known is not None:  # another drive of a machine that is known
        record = replace(known, drives={**known.drives, **measure_drive(where)}, busy_share=max(busy, known.busy_share))
    else:
        with ProgressReporter(quiet=quiet) as progress:
            measured = run_probe(where, baseline_bytes=process_baseline_bytes(), progress=progress)
            record = replace(measured, busy_share=round(busy, 3))
    if (why := write_record(record)) is not None:
        warnings.warn(
            f"the figures are not kept: {why}; set OFFMOE_CACHE to a folder that can be written", stacklevel=2
        )
    return record
