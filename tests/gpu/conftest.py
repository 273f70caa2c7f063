"""Tests that need a CUDA device: marked `gpu`, skipped without one.

Those that take `load_on_device` run on a simulated device too when OFFMOE_SIMULATE is set: so scripts/gpu_check, and
these tests themselves, are tried where there is no GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import load as load_engine

import offmoe

HERE = Path(__file__).resolve().parent
SIMULATED = bool(os.environ.get("OFFMOE_SIMULATE")) and not torch.cuda.is_available()

Load = Callable[..., offmoe.Engine]


@pytest.hookimpl(tryfirst=True)  # before marks select
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            simulated = SIMULATED and "load_on_device" in getattr(item, "fixturenames", ())
            if not torch.cuda.is_available() and not simulated:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def load_on_device() -> Load:
    """As `offmoe.load`, on the first CUDA device, or on a simulated one."""

    def load(folder: Path | None = None, **options: Any) -> offmoe.Engine:
        options = {"ram": "4GiB", "compile": "off", **options}  # a compilation takes longer than most tests
        if not SIMULATED:
            return offmoe.load(folder, **{"device": "cuda", **options})
        from offmoe.tiers.device import SimulatedDevice

        return load_engine(folder, simulated=SimulatedDevice(bytes_per_s=4e9), **options)

    return load


@pytest.fixture(autouse=True)
def no_leftovers() -> Any:
    """Each test begins with an empty device, so that peaks are its own."""
    if torch.cuda.is_available():
        torch.cuda.init()  # counters can be asked for afterwards only
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return None
