"""The engine on a device that is not the CPU: nothing mixes devices, waits twice, or reads what is being written."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pretend_cuda as pretend_cuda_module
import pytest
import torch
from engines import PROMPT, QUARTER, leaves_nothing, open_tiny, save_tiny
from pretend_cuda import load_guard, pretend_cuda, span
from stream_clocks import Stream, World

import offmoe
from offmoe.checkpoint.shard_file import ShardFile
from offmoe.kernels.make_slot_kernels import make_slot_kernels
from offmoe.kernels.slot_kernels import TorchSlotKernels
from offmoe.moe.executor import Executor
from offmoe.moe.resident import ResidentExecutor
from offmoe.tiers.device import DevicePool
from offmoe.tiers.host import HostPool
from offmoe.tiers.ring import RingCopier

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu has the real thing")

NUM_NEW = 8
HOST_SLOTS = 8


@pytest.fixture(scope="module", autouse=True)
def _guard(tmp_path_factory: pytest.TempPathFactory) -> None:
    load_guard(tmp_path_factory.mktemp("guard"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"), "gpt_oss")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """Fewer RAM slots than experts, so that these are read, moved and let go as well."""
    with leaves_nothing(), pretend_cuda(monkeypatch) as world:

        def make_host_pool(*, num_slots: int, slot_bytes: int) -> HostPool:
            pool = HostPool(num_slots=min(num_slots, HOST_SLOTS), slot_bytes=slot_bytes)
            world.watch(pool.slab, slot_bytes, "RAM")
            return pool

        def make_device_pool(device: torch.device, **options: Any) -> DevicePool:
            pool = DevicePool(device, **options)
            world.watch(pool.slab, pool.slot_bytes, "device")
            return pool

        def read_into(file: ShardFile, part: memoryview, *args: Any, **options: Any) -> Any:
            world.on_host(span(torch.from_numpy(np.frombuffer(part, np.uint8)), writes=True))
            return real_read(file, part, *args, **options)

        real_read = ShardFile.read_into
        monkeypatch.setattr(ShardFile, "read_into", read_into)
        monkeypatch.setattr("offmoe.loader.load.HostPool", make_host_pool)
        monkeypatch.setattr("offmoe.tiers.cuda.DevicePool", make_device_pool)
        monkeypatch.setattr("offmoe.loader.serving.make_slot_kernels", partial(make_slot_kernels, backend="torch"))
        monkeypatch.setattr(TorchSlotKernels, "looks_up", lambda kernels, layer_idx: True)  # as Triton's do
        for name in ("rows_forward", "tokens_forward", "lookup_forward"):
            real = getattr(TorchSlotKernels, name)
            monkeypatch.setattr(TorchSlotKernels, name, as_kernel(real, world))
        yield world


def as_kernel(function: Callable[..., Any], world: World) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        with world.kernel():
            return function(*args)

    return run


def on_cuda(folder: Path, **options: Any) -> offmoe.Engine:
    return open_tiny(folder, **{"device": "cuda", "compile": "off", "expert_slots": 2 * QUARTER, **options})


def ids_of(engine: offmoe.Engine, **options: Any) -> tuple[int, ...]:
    return engine.generate(PROMPT, max_new_tokens=NUM_NEW, temperature=0, ignore_eos=True, **options).token_ids


@pytest.fixture(scope="module")
def expected(folder: Path) -> tuple[int, ...]:
    with open_tiny(folder, expert_slots=2 * QUARTER) as engine:
        return ids_of(engine)


@pytest.mark.parametrize("miss", ["stream", "cpu"])
def test_a_decode_layer_waits_once_and_a_token_once(
    miss: str, cuda: World, folder: Path, expected: tuple[int, ...]
) -> None:
    with on_cuda(folder, miss=miss) as engine:
        ids_of(engine)
        pieces = engine.stream(PROMPT, max_new_tokens=NUM_NEW, temperature=0, ignore_eos=True)
        first = next(pieces)
        before = engine.stats()
        cuda.waits.clear()
        assert (*first.token_ids, *(id_ for p in pieces for id_ in p.token_ids)) == expected
        num_calls = engine.stats()["layer_calls"] - before["layer_calls"]
        after = engine.stats()
        assert after["misses"] > before["misses"]
        # Times are read when the host waits anyway. What the CPU serves may be on its way to the device as well.
        assert after["link_stall_ns"] > before["link_stall_ns"] or miss == "cpu"
    # One more forward pass than tokens that come from it is queued, if the stream ends after it.
    assert cuda.waits.total() <= num_calls + NUM_NEW, cuda.waits


def test_where_all_experts_are_on_the_device_only_the_token_is_waited_for(
    cuda: World, folder: Path, expected: tuple[int, ...]
) -> None:
    with on_cuda(folder, expert_slots="auto") as engine:
        assert isinstance(engine._parts.serving.executor, ResidentExecutor)
        ids_of(engine)
        pieces = engine.stream(PROMPT, max_new_tokens=NUM_NEW, temperature=0, ignore_eos=True)
        first = next(pieces)
        cuda.waits.clear()
        assert (*first.token_ids, *(id_ for p in pieces for id_ in p.token_ids)) == expected
    assert 0 < cuda.waits.total() <= NUM_NEW, cuda.waits


@pytest.mark.parametrize("refused", [False, True])
def test_nothing_is_read_while_it_is_written(
    refused: bool, cuda: World, folder: Path, expected: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefetches that are used, late, wrong and taken back; misses on the CPU; a call that is broken off."""
    if refused:
        monkeypatch.setattr("offmoe.tiers.cuda.try_pin", lambda slab: "refused")
    with on_cuda(folder, miss="auto", prefetch=2) as engine:
        assert ids_of(engine) == expected
        pieces = engine.stream(PROMPT[::-1], max_new_tokens=NUM_NEW, temperature=0, ignore_eos=True)
        for _ in range(3):
            next(pieces)
        pieces.close()
        assert ids_of(engine) == expected
        totals = engine.stats()
        assert totals["ahead_used_bytes"] and totals["ahead_wasted_bytes"] and totals["ram_evictions"]
    assert not cuda.races


def test_a_missing_mark_would_be_seen(cuda: World, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RingCopier, "mark", lambda copier: None)
    with on_cuda(folder, miss="stream", expert_slots=QUARTER) as engine:  # fewer than the prompt needs in a layer
        engine.generate(list(range(3, 40)), max_new_tokens=1)
    assert any("device" in race for race in cuda.races)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "nemotron_h", "qwen3_next", "granitemoe"])
def test_no_family_mixes_devices(family: str, cuda: World, tmp_path: Path) -> None:
    sampling = {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2}
    with on_cuda(save_tiny(tmp_path, family), miss="stream", prefetch=1) as engine:
        reply = engine.generate(list(range(3, 40)), max_new_tokens=3, ignore_eos=True, **sampling)
        assert len(reply.token_ids) == 3
    assert not cuda.races


# Views, and the wait for the router's choices.
FREE = ("flatten", "select", "slice", "view", "split_with_sizes", "resolve_conj", "resolve_neg", "to")


def test_a_layer_of_hits_is_one_call_of_the_kernels_and_one_wait(
    cuda: World, folder: Path, expected: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Operations of a layer call beside the kernels for its experts, which with Triton are two launches: one for an
    expert that lies elsewhere than when it was last used, and no other.
    """
    now, calls = list[Counter[str]](), list[Counter[str]]()
    real_run, real_layer = pretend_cuda_module.run, Executor.run_layer

    def run(func: Any, args: Any, kwargs: Any) -> Any:
        if now and not getattr(cuda.per_thread, "in_kernel", False):
            now[-1][func.overloadpacket.__name__] += 1
        return real_run(func, args, kwargs)

    def run_layer(executor: Executor, *args: Any) -> Any:
        counters, waits = executor.cache.counters, cuda.waits.total()
        before = counters.misses + counters.late_hits
        now.append(Counter())
        y_TD = real_layer(executor, *args)
        done = now.pop()
        if counters.misses + counters.late_hits == before:
            assert cuda.waits.total() == waits + 1
            calls.append(Counter({name: count for name, count in done.items() if name not in FREE}))
        return y_TD

    monkeypatch.setattr(pretend_cuda_module, "run", run)
    monkeypatch.setattr(Executor, "run_layer", run_layer)
    with on_cuda(folder, miss="stream", prefetch="off", expert_slots=4 * QUARTER - 1) as engine:
        assert ids_of(engine) == expected
    assert len(calls) >= 6
    assert all(set(call) <= {"fill_"} for call in calls), calls
    assert Counter() in calls and not cuda.races


class SeenLate(random.Random):
    """Every event is seen late, at the 41st look."""

    def randint(self, a: int, b: int) -> int:
        return 40


def test_a_callers_other_stream_comes_behind_what_was_queued_before(cuda: World, folder: Path) -> None:
    """Copies for the first call are waited for on its stream; the host has not seen those of the last layer end when
    the second call reads the same slots on another stream. All experts but one have slots.
    """
    with on_cuda(folder, miss="stream", prefetch="off", expert_slots=4 * QUARTER - 1) as engine:
        cuda.late, cuda.random = 1.0, SeenLate()
        ids_1T = torch.tensor([[5]], device="cuda")
        before = engine.model(input_ids=ids_1T, use_cache=False).logits
        with torch.cuda.stream(Stream(name="own")):
            logits = engine.model(input_ids=ids_1T, use_cache=False).logits
        assert torch.equal(logits.cpu(), before.cpu())
    assert not cuda.races


@pytest.mark.parametrize("num_tokens", [6, 24])
def test_in_one_place_rounding_does_not_depend_on_what_is_cached(
    num_tokens: int, cuda: World, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On kernels that differ as the real ones do, only more: by the number of rows in a call, and where they sum."""
    for name, change in {
        "rows_forward": lambda x_TD, slot_N: 1 if len(x_TD) == 1 else 1 + slot_N.numel() / 8,
        "lookup_forward": lambda x_TD, slot_N: 3,
    }.items():
        monkeypatch.setattr(TorchSlotKernels, name, changed(getattr(TorchSlotKernels, name), change))

    def ids(engine: offmoe.Engine) -> tuple[int, ...]:
        return engine.generate(range(3, 3 + num_tokens), max_new_tokens=4, temperature=0, ignore_eos=True).token_ids

    with open_tiny(folder, device="cpu", expert_slots=QUARTER) as engine:
        expected = ids(engine)
    for experts in (QUARTER, 4 * QUARTER):
        with on_cuda(folder, placement_invariant=True, expert_slots=experts) as engine:
            assert ids(engine) == expected
            assert experts > QUARTER or ids(engine) == expected, "with what the first one left"


def changed(function: Callable[..., Any], factor: Callable[..., float]) -> Callable[..., Any]:
    def run(kernels: Any, layer_idx: int, x_TD: torch.Tensor, *rest: torch.Tensor) -> Any:
        return function(kernels, layer_idx, x_TD, *rest) * factor(x_TD, rest[1])

    return run
