"""Misses computed where they lie: in RAM slots, on a thread beside the device's work.

Concurrency. The thread only multiplies: look-ups, reads and holds in the RAM cache are made by the thread that runs
the model. An expert's slot is held from before its product is queued until the job is closed.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import torch

from offmoe.cache.expert_cache import ExpertCache
from offmoe.cache.fetch import Fetch
from offmoe.core.keys import ExpertKey
from offmoe.formats.dense import ExpertWeights
from offmoe.kernels.indices import upload
from offmoe.kernels.reference import ExpertMath
from offmoe.moe.backends import Computed, ExpertBackend, ReferenceBackend
from offmoe.moe.dispatch import Assignment

# The most tokens whose states are copied to RAM in every layer call, in case an expert is computed there.
MAX_TOKENS_ALONG = 16

Group = list[tuple[ExpertWeights, list[Assignment]]]
ComputedRows = tuple[torch.Tensor, torch.Tensor]
Compute = Callable[[list[Computed], torch.Tensor, torch.Tensor], None]


class CpuExperts:
    """Computes experts out of `host`, the cache of RAM slots."""

    def __init__(
        self, host: ExpertCache, settle: Callable[[], None], rows: ExpertBackend | None = None, *,
        clock_ns: Callable[[], int] = time.perf_counter_ns,
    ) -> None:  # fmt: skip
        """`settle` waits until no copy to the device holds a RAM slot. `rows` computes them, by default in torch."""
        self._host, self._settle, self._rows, self._clock_ns = host, settle, rows or ReferenceBackend(), clock_ns
        self._thread = _start_thread()
        self._maths: dict[int, tuple[ExpertMath, ExpertMath]] = {}
        self._can_pin = True

    def take_along(self, x_TD: torch.Tensor) -> torch.Tensor | None:
        """Queue a copy of a few tokens' states to pinned RAM, so that computing here costs no wait of its own.

        The bytes are there after the caller's next wait for the device. None: too many, no device, or no pinned memory.
        """
        if x_TD.device.type != "cuda" or len(x_TD) > MAX_TOKENS_ALONG or not self._can_pin:
            return None
        try:
            on_host = torch.empty(x_TD.shape, dtype=x_TD.dtype, pin_memory=True)
        except RuntimeError:
            self._can_pin = False
            return None
        return on_host.copy_(x_TD, non_blocking=True)

    def start(
        self, layer_idx: int, math: ExpertMath, experts: dict[ExpertKey, list[Assignment]], x_TD: torch.Tensor
    ) -> CpuJob:
        """Begin; the experts that RAM has are computed at once, the others when they were read."""
        compute = partial(self._rows.compute, layer_idx, self.cpu_math(layer_idx, math))
        job = CpuJob(self._host, self._settle, self._thread, compute, x_TD.to("cpu"), math.dtype, self._clock_ns)
        try:
            job.begin(experts)
        except BaseException:
            job.close()
            raise
        return job

    def cpu_math(self, layer_idx: int, math: ExpertMath) -> ExpertMath:
        """The layer's arithmetic with its resident parts in RAM; copied once."""
        original, on_cpu = self._maths.get(layer_idx, (None, math))
        if original is not math:
            norm = math.post_norm
            on_cpu = dataclasses.replace(
                math,
                up_bias_EF=None if math.up_bias_EF is None else math.up_bias_EF.cpu(),
                down_bias_ED=None if math.down_bias_ED is None else math.down_bias_ED.cpu(),
                post_norm=copy.deepcopy(norm).cpu() if isinstance(norm, torch.nn.Module) else norm,
            )
            self._maths[layer_idx] = (math, on_cpu)
        return on_cpu

    def restart(self) -> None:
        """End whatever is computed, also for a job that was lost."""
        self.close()
        self._thread = _start_thread()

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)


def _start_thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="offmoe-cpu-experts")


class CpuJob:
    """The experts of one layer call that are computed in RAM."""

    def __init__(
        self, host: ExpertCache, settle: Callable[[], None], thread: ThreadPoolExecutor, compute: Compute,
        x_TD: torch.Tensor, dtype: torch.dtype, clock_ns: Callable[[], int],
    ) -> None:  # fmt: skip
        self._host, self._settle, self._thread, self._clock_ns = host, settle, thread, clock_ns
        self._compute_rows, self._x_TD, self._dtype = compute, x_TD, dtype
        self._coming: list[tuple[Fetch, list[Assignment]]] = []
        self._waiting: list[tuple[ExpertKey, list[Assignment]]] = []
        self._held: list[ExpertKey] = []
        self._group: Group = []
        self._results: list[Future[ComputedRows]] = []

    def begin(self, experts: Mapping[ExpertKey, list[Assignment]]) -> None:
        """Begin to compute what RAM has, at once and as one piece of work; the rest when it was read."""
        for key, assigned in experts.items():
            self._add(key, assigned)
        self._queue()

    def _add(self, key: ExpertKey, assigned: list[Assignment]) -> None:
        """Hold `key` for the next piece of work, or fetch it. While RAM has no slot for it, it waits for `collect`."""
        if self._host.is_ready(key):
            self._host.counters.hits += 1
            weights = self._host.use(key, touch=True)
            self._held.append(key)
            self._group.append((weights, assigned))
            return
        late = self._host.is_coming(key)
        fetch = self._host.start(key, cold=False)
        if fetch is None:
            self._waiting.append((key, assigned))
        else:
            self._host.counters.late_hits += late
            self._host.counters.misses += not late
            self._coming.append((fetch, assigned))

    def collect(self, y_SD: torch.Tensor) -> int:
        """Wait for everything and write the rows into `y_SD`, on whatever device it lies. Returns the nanoseconds that
        were waited for the disk.
        """
        disk_stall_ns = 0
        while self._coming or self._waiting:
            if not self._coming:
                self._make_room()
            fetch, assigned = self._coming.pop(0)
            begin = self._clock_ns()
            weights = self._host.finish(fetch)
            disk_stall_ns += self._clock_ns() - begin
            self._held.append(fetch.key)
            self._group.append((weights, assigned))
            self._queue()
        for future in self._results:
            choices_N, y_ND = future.result()
            y_SD[upload(choices_N, y_SD.device)] = upload(y_ND, y_SD.device)
        self._results = []
        self._let_go()
        return disk_stall_ns

    def _make_room(self) -> None:
        """Every RAM slot is held: finish what was queued, let its slots go, and start with those that wait."""
        for future in self._results:
            future.exception()
        self._let_go()
        self._settle()
        waiting, self._waiting = self._waiting, []
        self.begin(dict(waiting))
        assert self._coming or not self._waiting, f"{self._host!r} has no slot to free"

    def _queue(self) -> None:
        group, self._group = self._group, []
        if group:
            self._results.append(self._thread.submit(self._compute, group))

    @torch.inference_mode()
    def _compute(self, group: Group) -> ComputedRows:
        """On the thread: (choices, rows) of all experts of a group, in the order of their choices."""
        flat = [assignment for _, assigned in group for assignment in assigned]
        choices_N = torch.cat([torch.atleast_1d(torch.as_tensor(each.choices_N)) for each in flat])
        y_ND = torch.empty(len(choices_N), self._x_TD.shape[-1], dtype=self._dtype)
        begin, experts = 0, []
        for weights, assigned in group:
            local = []
            for each in assigned:
                rows = torch.arange(begin, begin + each.num_rows)
                choices = begin if isinstance(each.choices_N, int) else rows
                local.append(dataclasses.replace(each, choices_N=choices, tokens_N=each.host_tokens_N))
                begin += each.num_rows
            experts.append(Computed(-1, weights, local))
        self._compute_rows(experts, self._x_TD, y_ND)
        return choices_N, y_ND

    def close(self) -> None:
        """Nothing is computed or read for this job any more, and nothing is held. Called however the call ended."""
        for future in self._results:
            if not future.cancel():
                future.exception()
        self._let_go()
        self._host.abandon(fetch for fetch, _ in self._coming)
        self._coming = []

    def _let_go(self) -> None:
        held, self._held = self._held, []
        self._host.release(held)
