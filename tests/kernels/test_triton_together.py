"""Kernels are compiled side by side before they are first launched: which, how many at a time, and what is said.

No GPU: Triton is told of one that nobody has, and its compiler is stood in for, since nothing is launched. Not run
where this process interprets.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest.mock import MagicMock

import pytest
import slot_cases as cases
import torch
from patience import PATIENCE_S

from offmoe.formats.layout import layout_of
from offmoe.kernels.activations import Activation
from offmoe.kernels.geometry import Tiling

triton = pytest.importorskip("triton", reason="triton has no wheel for this platform")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted")

KERNELS = ("choose_rows", "weighted_rows", "tile_rows")
# A gated layer: rows one by one (both matrices, indices in two types), summed, looked up; tiles of three sizes.
ASKED = {"choose_rows": 4, "weighted_rows": 2, "tile_rows": 6}


class Compiler:
    """Stands for Triton's: holds each kernel until `most` are compiled at a time, refuses those of `refused`."""

    def __init__(self, *, refused: str = "") -> None:
        self.refused, self.lock, self.full = refused, threading.Lock(), threading.Event()
        self.asked: list[str] = []
        self.running = self.most = 0

    def __call__(self, source: Any, **options: Any) -> Any:
        with self.lock:
            self.asked.append(source.fn.__name__)
            self.running += 1
            self.most = max(self.most, self.running)
            if self.running == 4:
                self.full.set()
        assert self.full.wait(PATIENCE_S), "kernels are compiled one after the other"
        with self.lock:
            self.running -= 1
        if source.fn.__name__ == self.refused:
            raise RuntimeError("PassManager::run failed\nmore")
        return MagicMock(spec=["run", "launch_metadata", "function", "packed_metadata", "result"])


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from triton.backends.compiler import GPUTarget

    from offmoe.kernels.triton import check as triton_check
    from offmoe.kernels.triton import experts as triton_experts

    driver = MagicMock()
    driver.get_current_device.return_value = driver.get_current_stream.return_value = 0
    driver.get_current_target.return_value = GPUTarget("cuda", 90, 32)
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(triton_check, "num_cores", lambda: 64)
    caches = [getattr(triton_experts, name).device_caches for name in KERNELS]
    for cache in caches:
        cache.clear()
    yield
    for cache in caches:
        cache.clear()


def compile_with(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[tuple[int, int]]]:
    """The trial of a layer whose kernels `compiler` has compiled, and the progress that was told."""
    from offmoe.kernels.triton.check import LaunchCheck, compile_together
    from offmoe.kernels.triton.launch import LayerKernels

    monkeypatch.setattr(triton.compiler, "compile", compiler)
    case = cases.make_case(
        layout="published", dtype=torch.bfloat16, width_D=64, width_F=32, activate=cases.silu_gate
    )  # fmt: skip
    slots = (case.slab, case.slot_bytes)
    activation = Activation(kind="silu", gated=True)
    kernels = LayerKernels(case.layer, layout_of(case.layer), case.math, activation, *slots, Tiling())
    trial = LaunchCheck(kernels, case.layer, case.math, *slots)
    told: list[tuple[int, int]] = []
    compile_together([trial], lambda done, total: told.append((done, total)))
    return trial, told


def test_a_layers_kernels_are_compiled_four_at_a_time_and_never_again(
    pretended_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = Compiler()
    trial, told = compile_with(compiler, monkeypatch)
    assert Counter(compiler.asked) == ASKED
    assert compiler.most == 4
    assert told == [(done, 12) for done in range(1, 13)]
    for call in trial.calls(trial.kernels).values():  # as the first prompt and the first token do
        call()
    assert len(compiler.asked) == 12


def test_a_kernel_that_is_refused_is_named_and_the_others_are_compiled(
    pretended_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from offmoe.kernels.triton.check import failure_of

    compiler = Compiler(refused="weighted_rows")
    trial, told = compile_with(compiler, monkeypatch)
    assert Counter(compiler.asked) == ASKED
    assert told[-1] == (12, 12)
    assert failure_of(trial) == "triton failed on rows that are summed: PassManager::run failed"
