"""Calls of the transformers model itself: one at a time, within `ram`, without gradients, never saved without experts.

The engine's parts (cache, reads, kernels) serve one call at a time. A second call from another thread is told so before
it touches them, and so is one whose tokens or logits need more memory than is left; `torch.nn.Module`'s own hooks
around the whole model's forward do that.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import PreTrainedModel

from offmoe.core.errors import BudgetError, EngineBusyError, UsageError
from offmoe.core.units import MIB, format_bytes
from offmoe.loader.budgets import model_shape
from offmoe.machine.memory import rss_bytes
from offmoe.memory.budget import MemoryPlan
from offmoe.memory.workspace import workspace_bytes


class OneCallAtATime:
    """Guard around every forward of a model. A thread may call it again within a call of its own.

    Concurrency: Ctrl-C may strike between any two lines, also between entering and the call. So a thread that is noted
    as being inside counts only while its stack shows it: a frame of one of `holders` (ids of the model and of whatever
    computes in its place).
    """

    def __init__(self) -> None:
        self._lock, self._owner, self._depth = threading.Lock(), 0, 0
        self.holders: set[int] = set()

    def enter(self, *_: object) -> None:
        """Before a call. Raises EngineBusyError while another thread is in one."""
        if torch.compiler.is_dynamo_compiling():
            return
        if self._owner != threading.get_ident():
            with self._lock:
                if self._owner and self._is_inside(self._owner):
                    raise EngineBusyError(
                        "the model is computing for another thread; wait for it, or load a second engine"
                    )
                self._owner, self._depth = threading.get_ident(), 0
        self._depth += 1

    def leave(self, *_: object) -> None:
        """After a call, whatever became of it; also after one that was refused, which changes nothing."""
        if torch.compiler.is_dynamo_compiling() or self._owner != threading.get_ident():
            return
        self._depth -= 1
        if self._depth <= 0:
            self._owner = 0

    def _is_inside(self, thread_id: int) -> bool:
        frame = sys._current_frames().get(thread_id)
        while frame is not None:
            if id(frame.f_locals.get("self")) in self.holders:
                return True
            frame = frame.f_back
        return False

    def __enter__(self) -> None:
        self.enter()

    def __exit__(self, *_: object) -> None:
        self.leave()


class CallBudget:
    """The memory of a call of the model in RAM, counted from its arguments before any of it is taken."""

    def __init__(self, model: PreTrainedModel, plan: MemoryPlan, context_length: int, *, baseline_bytes: int) -> None:
        self._shape, self._plan, self._baseline_bytes = model_shape(model), plan, baseline_bytes
        self._kv_bytes_per_token = plan.kv_bytes / context_length

    def check(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse a call before it begins: BudgetError for one that needs more than `ram` leaves."""
        given = next(
            (x for x in (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if x is not None), None
        )
        if not isinstance(given, torch.Tensor) or given.dim() < 2 or torch.compiler.is_dynamo_compiling():
            return
        batch, tokens = given.shape[:2]
        if batch * tokens <= self._plan.prefill_chunk and _logits_kept(kwargs, tokens) == 1:
            return  # planned: the engine's own calls are such
        need = self._need_bytes(batch, tokens, kwargs)
        if need <= self._plan.workspace_bytes + self._plan.kv_bytes:
            return
        left = max(0, self._plan.ram_bytes - max(0, rss_bytes() - self._baseline_bytes))
        if need > left:
            rows = batch * _logits_kept(kwargs, tokens)
            raise BudgetError(
                f"this call of the model, {batch} x {tokens} tokens with {rows} rows of logits, needs "
                f"{format_bytes(need)} beside the weights, and ram leaves {format_bytes(left)} of "
                f"{format_bytes(self._plan.ram_bytes)}; give fewer tokens or sequences at once, ask for fewer logits "
                f"(logits_to_keep), or {self._room_for(need - left)}"
            )

    def _room_for(self, lacking_bytes: int) -> str:
        """Advice: a larger `ram` alone would become expert slots."""
        slots = self._plan.num_slots - -(-lacking_bytes // self._plan.slot_bytes)
        if slots >= max(1, self._plan.num_slots // 4):
            return f"load with expert_slots={slots} instead of {self._plan.num_slots}"
        more = -(-(self._plan.ram_bytes + lacking_bytes) // MIB)
        return f"load with ram={more}MiB and expert_slots={self._plan.num_slots}"

    def _need_bytes(self, batch: int, tokens: int, kwargs: dict[str, Any]) -> int:
        # Logits in the model's type; with labels once more in float32, and their probabilities.
        item = self._shape.item_bytes + (8 if kwargs.get("labels") is not None else 0)
        logits = batch * _logits_kept(kwargs, tokens) * self._shape.vocab_size * item
        grows = kwargs.get("use_cache") is not False
        kv = round(self._kv_bytes_per_token * batch * tokens) if grows else 0
        return workspace_bytes(self._shape, chunk=batch * tokens, context_length=tokens) + logits + kv


def _logits_kept(kwargs: dict[str, Any], tokens: int) -> int:
    """Rows of logits a sequence: `logits_to_keep`, where nothing and 0 mean all."""
    keep = kwargs.get("logits_to_keep")
    if isinstance(keep, torch.Tensor):
        return int(keep.numel())
    return min(keep, tokens) if keep else tokens


def guard_calls(
    model: PreTrainedModel, folder: Path, budget: CallBudget | None
) -> tuple[OneCallAtATime, Callable[[], None]]:
    """Let `model`, whose experts are in the files of `folder`, be called by one thread at a time, within `budget`. No
    parameter wants a gradient from now on: through experts there is none (hf/seam.py). Saving it is refused.
    Returns the guard, for calls that pass the model's own forward by, and what takes the hooks away.
    """
    model.requires_grad_(False)
    calls = OneCallAtATime()
    calls.holders.add(id(model))
    hooks = [
        *([] if budget is None else [model.register_forward_pre_hook(budget.check, with_kwargs=True)]),
        model.register_forward_pre_hook(calls.enter, prepend=True),
        model.register_forward_hook(calls.leave, always_call=True),
    ]

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise UsageError(
            f"engine.model has no experts in memory, so a saved one would lack them; copy {folder}, or write a smaller "
            "checkpoint with offmoe quantize"
        )

    model.save_pretrained = refuse

    def remove() -> None:
        for hook in hooks:
            hook.remove()

    return calls, remove
