"""Triton kernels before their first use: compiled side by side, and tried on random weights against torch.

Shapes: N rows, T tokens, K experts a token, E experts, D model width.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from triton import AsyncCompileMode
from triton.errors import TritonError

from offmoe.checkpoint.expert_index import MoeLayer
from offmoe.formats.dense import view_expert
from offmoe.formats.layout import layout_of
from offmoe.kernels.geometry import TILE_ROWS, make_tiles
from offmoe.kernels.random_weights import fill_at_random
from offmoe.kernels.reference import ExpertMath, combine_rows
from offmoe.kernels.slot_kernels import TorchSlotKernels
from offmoe.kernels.triton.launch import LayerKernels
from offmoe.machine.memory import give_back_freed_memory, num_cores

# How far the check at load may be from torch, relative to the largest output: a few roundings of a hidden value.
TOLERANCES = {torch.bfloat16: 0.03, torch.float16: 0.005, torch.float32: 0.001}
# Kernels that are compiled at a time: each takes memory, and Python itself is one thread's at a time.
MOST_COMPILERS = 4
_CHECK_SEED = 11
# What a compiler that is missing, refuses or asks for too much raises. The assertion is that libcuda.so was found.
_FAILURES = (TritonError, RuntimeError, OSError, ImportError, AssertionError, subprocess.SubprocessError)


class LaunchCheck:
    """A layer's kernels with inputs for each of them.

    `calls` are all launches that an engine makes, so that its first token compiles nothing.
    """

    def __init__(
        self, kernels: LayerKernels, layer: MoeLayer, math: ExpertMath, slab: torch.Tensor, slot_bytes: int
    ) -> None:
        self.kernels, self._layer, self._math = kernels, layer, replace(math, post_norm=None)
        self.dtype = math.dtype
        self._slab, self._slot_bytes = slab, slot_bytes
        device, top_k, num_experts = slab.device, layer.top_k, layer.num_experts
        self._num_slots = num_slots = min(3, slab.numel() // slot_bytes, num_experts)
        self._slot_of_E = torch.full((num_experts,), -1, dtype=torch.int32, device=device)
        self._slot_of_E[:num_slots] = torch.arange(num_slots, device=device)
        num_tokens = TILE_ROWS[0] + 3
        self._x_TD = torch.zeros(num_tokens, kernels.up[0].num_in, device=device, dtype=math.dtype)
        row_N = torch.arange(num_tokens * top_k, dtype=torch.int32, device=device)
        self._token_N, self._expert_N = row_N // top_k, row_N % min(num_experts, num_slots + 1)
        self._slot_N = self._slot_of_E[self._expert_N]
        # In the type in which most routers give them, or the first token would compile once more.
        self._weights_1K = torch.zeros(1, top_k, device=device, dtype=math.dtype)
        self._missing = torch.zeros(1, dtype=torch.int32, device=device)

    def calls(self, kernels: LayerKernels) -> dict[str, Callable[[], torch.Tensor]]:
        """Every call of `kernels`, by the name of what it computes."""
        x_1D, top_k, dtype = self._x_TD[:1], self._layer.top_k, self.dtype
        tokens, experts, slots = (indices[:top_k] for indices in (self._token_N, self._expert_N, self._slot_N))

        def tiles(block_rows: int) -> torch.Tensor:
            cut = make_tiles(self._slot_N, block_rows, self._layer.num_experts)
            return kernels.tiles(self._x_TD, self._token_N, self._expert_N, *cut)

        def rows() -> torch.Tensor:
            return kernels.project(kernels.choose(x_1D, tokens, experts, slots), experts, slots)

        def summed() -> torch.Tensor:
            hidden = kernels.choose(x_1D, top_k, experts, slots)
            return kernels.project_and_sum(hidden, experts, slots, self._weights_1K, dtype)

        def looked_up() -> torch.Tensor:
            ids = experts.long()  # as routers give them
            hidden = kernels.choose(x_1D, top_k, ids, self._slot_of_E, missing=self._missing)
            return kernels.project_and_sum(hidden, ids, self._slot_of_E, self._weights_1K, dtype, lookup=True)

        named = {"rows": rows, "rows that are summed": summed, "rows that are looked up": looked_up}
        of_tiles = {f"tiles of {block_rows} rows": partial(tiles, block_rows) for block_rows in TILE_ROWS}
        return {**named, **(of_tiles if kernels.has_tiles else {})}

    def expected(self) -> dict[str, torch.Tensor]:
        """By the same names, the outputs of torch for random inputs and weights, which are written into the first
        slots.
        """
        self._draw()
        torch_kernels = TorchSlotKernels([self._layer], [self._math], self._slab, self._slot_bytes)
        y_ND = torch_kernels.rows_forward(0, self._x_TD, self._token_N, self._slot_N, self._expert_N)
        y_KD = y_ND[: self._layer.top_k]
        y_1D = combine_rows(y_KD, self._weights_1K, self.dtype)
        of_one = {"rows": y_KD, "rows that are summed": y_1D, "rows that are looked up": y_1D}
        return {name: of_one.get(name, y_ND) for name in self.calls(self.kernels)}

    def _draw(self) -> None:
        generator = torch.Generator(self._slab.device).manual_seed(_CHECK_SEED)
        offsets = layout_of(self._layer).offsets
        for slot in range(self._num_slots):
            begin = slot * self._slot_bytes
            weights = view_expert(self._layer, self._slab[begin : begin + self._slot_bytes], offsets)
            for part in (*weights.up, *weights.down):
                transposed = self._layer.transposed and isinstance(part, torch.Tensor)
                fill_at_random(part, part.shape[0 if transposed else 1], generator)
        options: dict[str, Any] = {"device": self._slab.device, "generator": generator}
        self._x_TD = torch.randn(self._x_TD.shape, **options).to(self.dtype)
        self._weights_1K = torch.rand(self._weights_1K.shape, **options).to(self.dtype)


def compile_together(checks: Sequence[LaunchCheck], progress: Callable[[int, int], None]) -> None:
    """Compile the kernels of `checks`, MOST_COMPILERS at a time; nothing runs on the device.

    What is refused is told by `failure_of`, which asks again. `progress(done, total)` counts kernels. Triton's passes
    run without the interpreter's lock; its front end, in Python, does not.
    """
    num_threads = min(MOST_COMPILERS, num_cores())
    with ThreadPoolExecutor(num_threads, "offmoe-triton") as threads:
        noting = _Noting(threads)
        with AsyncCompileMode(noting, ignore_errors=True):
            for check in checks:
                for call in check.calls(check.kernels.compiling()).values():
                    with suppress(*_FAILURES):
                        call()
            for done, _ in enumerate(as_completed(noting.futures), 1):
                progress(done, len(noting.futures))
    give_back_freed_memory()


class _Noting(Executor):
    """`executor`, and the futures of what it was given."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.futures: list[Future[Any]] = []

    def submit(self, work: Callable[..., Any], /, *args: Any, **options: Any) -> Future[Any]:
        self.futures.append(self._executor.submit(work, *args, **options))
        return self.futures[-1]


def failure_of(check: LaunchCheck) -> str | None:
    """Every kernel of the layer on random weights, against torch: what went wrong, None if nothing."""
    name = "the inputs of its check"
    errors: list[torch.Tensor] = []
    try:
        for name, wanted in check.expected().items():
            got = check.calls(check.kernels)[name]()
            # Relative to the largest output; nan where a kernel gave one.
            errors.append(((got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)).float())
        worst = float(torch.stack(errors).max())
    except torch.AcceleratorError:  # the device itself is lost: whatever is computed instead would fail elsewhere
        raise
    except _FAILURES as error:
        said = str(error).strip()
        return f"triton failed on {name}: {said.splitlines()[0] if said else type(error).__name__}"
    tolerance = TOLERANCES[check.dtype]
    return None if worst <= tolerance else f"triton differs from torch by {worst:.2g}, allowed are {tolerance}"


def current(device: torch.device) -> AbstractContextManager[object]:
    """Make `device` the current one: Triton launches there."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
