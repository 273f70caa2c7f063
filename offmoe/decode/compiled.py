"""The compiled decode step: when it is made, and whether it is used.

A compiled step works on the whole of the eager cache's memory, as many rows as the context has tokens: masked rows cost
a GPU little, and another step for each length would be compiled for minutes each. A step is used after it once gave the
logits of the model's own step, on a token of the user's.

Never an error: what does not compile, or does not agree, is not used, and `DecodeCompiler.state` says why.

In the background, a thread compiles while the model's own steps go on, once the engine has decoded so many tokens that
more are to be expected: compiling takes half of the interpreter for a minute or more. torch's compiler is not made for
that, which is why compile="on" waits instead:
- its process-wide "is compiling" flag makes transformers' eager code write masks out (same values, maybe another
  attention kernel's rounding);
- it puts the default type and the default random states back, which is undone (process_state.py);
- its tracer replaces the call of every module of the process meanwhile, for a tenth of the time; modules of other
  threads are called as ever through it (tests/decode/test_compile_beside.py);
- it runs in Python, so that eager steps meanwhile share the interpreter with it
  (benchmarks/2026-11-22-compiled-steps.md).
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch

from offmoe.core.config import EngineConfig
from offmoe.core.errors import OffmoeError
from offmoe.decode.compare import allowed_difference, difference
from offmoe.decode.compile_thread import CompileThread, is_compiling
from offmoe.decode.compiled_step import CompiledStep, Lowering, lower_with_inductor
from offmoe.hf.door import DynamicCache, PreTrainedModel
from offmoe.kv.cache import make_kv_cache
from offmoe.kv.static_cache import StaticKv, UnsupportedCacheError

_log = logging.getLogger(__name__)

# Tokens that an engine decodes before it compiles in the background: short questions and their answers never need it.
TOKENS_BEFORE = 128
# Steps on which the two may differ by more: a router that nearly ties is decided by rounding.
_NUM_TRIES = 3
# torch before 2.13 marks the whole process while one thread traces, and refuses compiled code in all of them
# ("Detected that you are using FX to symbolically trace a dynamo-optimized function").
_RUNS_WHILE_COMPILING = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)
# On CUDA the first call warms up, the second records, the third replays.
_RUNS_TO_REPLAY = 3


class EagerStep(Protocol):
    """The model's own step. `position` is the number of tokens in the cache."""

    position: int

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """Last logits (1, V) after appending ids (1, N)."""


class DecodeCompiler:
    """Decodes with a compiled step where there is one. Owns the KV cache, one for all generations of an engine.

    `state`: "waiting" (nothing decoded yet), "compiling", "on" (and whether lookahead misses layers in compiled steps),
    or "failed: " and the reason.
    """

    def __init__(
        self, model: PreTrainedModel, context_length: int, *, background: bool,
        lower: Lowering = lower_with_inductor, on_compile: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:  # fmt: skip
        self._model, self._context_length, self._background = model, context_length, background
        self._lower, self._on_compile = lower, on_compile
        self.cache = make_kv_cache(model, context_length)
        self.state = "waiting"
        self._step: CompiledStep | None = None  # a whole one
        self._active: CompiledStep | None = None
        self._coming: CompiledStep | None = None
        self._thread: CompileThread | None = None
        self._checked: set[int] = set()  # threads
        self._num_disagreed = self._num_decoded = 0
        self._closed = self._warned = False
        if self.cache is None:
            self._fail("the model brings its own KV cache")

    @torch.inference_mode()
    def begin(self, *, num_held: int) -> None:
        """A new sequence; the cache holds `num_held` tokens of the last one.

        The eager cache takes over: its owner drops what the new sequence does not begin with.
        """
        if self._active is not None and self.cache is not None:
            self._active.static.hand_back(num_held)
        self._active = None

    @torch.inference_mode()
    def empty_cache(self) -> DynamicCache | None:
        """The cache, with nothing in it: steps are compiled for its memory, so there is never another."""
        for layer in self.cache.layers if self.cache is not None else ():
            layer.reset()
        return self.cache

    @property
    def path(self) -> str:
        """The way that the last token took."""
        return "eager" if self._active is None else "compiled"

    @property
    def reason(self) -> str:
        """The state of compiling, which decides the way."""
        return f"compile is {self.state}"

    def close(self) -> None:
        """Let go of the model. A compilation in the background is interrupted and waited for, so that nothing keeps
        weights and KV cache afterwards.
        """
        self._closed = True
        self._drop_step()
        self._active = self.cache = None
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.interrupt()

    def __call__(self, eager: EagerStep, ids: torch.Tensor) -> torch.Tensor:
        """Last logits (1, V) after appending the one token `ids` (1, 1), compiled or not."""
        position = eager.position
        step = self._choose()
        if step is not self._active:
            if self._active is not None:
                self._active.static.hand_back(position)
            self._active = step
        self._num_decoded += 1
        if step is None:
            return eager(ids)
        if threading.get_ident() not in self._checked:
            return self._check(step, eager, ids)
        logits = step(ids, position)
        eager.position += 1
        return logits

    def _choose(self) -> CompiledStep | None:
        """The step to take, None for the model's own. May begin, or do, a compilation."""
        if self._closed or (is_compiling() and not _RUNS_WHILE_COMPILING):
            return None
        if self.state.startswith("failed"):
            self._warn()
            return None
        is_due = not self._background or self._num_decoded >= TOKENS_BEFORE
        if self._step is None and self._thread is None and is_due:
            self._start()
        return self._step if self._step is not None and self._step.fits else None

    def _start(self) -> None:
        assert self.cache is not None
        try:
            step = CompiledStep(self._model, StaticKv(self.cache, self._context_length), self._lower)
        except UnsupportedCacheError as error:
            self._fail(str(error))
            return
        self.state, self._coming = "compiling", step
        if self._background:
            thread = CompileThread(partial(self._compile, step))
            try:
                thread.start()
            except RuntimeError as error:  # the system has no more threads
                self._fail(_reason(error))
                self._coming = None
                return
            self._thread = thread
            return
        self._on_compile(0, 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._compile(step)
        self._on_compile(1, 1)

    def _compile(self, step: CompiledStep) -> None:
        """On the caller's thread or on one of its own; `_step` and `state` change last."""
        try:
            step.compile()
            if not self._closed:
                self._step = step
                self.state = "on" + (f", {step.num_blind} layers without lookahead" if step.num_blind else "")
        except Exception as error:  # noqa: BLE001 - torch.compile raises anything, and there is a way on without it
            self._fail(_reason(error))
        finally:  # after the step was noted: without it and without a thread, it would be compiled again
            self._thread = self._coming = None

    def _check(self, step: CompiledStep, eager: EagerStep, ids: torch.Tensor) -> torch.Tensor:
        """Both ways, the model's own last, so that what it wrote stays; its logits are the result."""
        position = eager.position
        logits = torch.empty(0)
        try:
            for _ in range(_RUNS_TO_REPLAY if step.on_cuda else 1):
                with step.static.undone():
                    logits = step(ids, position)
        except OffmoeError:
            raise
        except Exception as error:  # noqa: BLE001 - as in _compile: a graph may fail when it first runs
            self._fail(_reason(error))
        step.static.hand_back(position)
        expected = eager(ids)
        if logits.numel():
            self._judge(step, difference(logits, expected))
        return expected

    def _judge(self, step: CompiledStep, found: float) -> None:
        limit = allowed_difference(self._model.dtype)
        if found <= limit:
            self._checked.add(threading.get_ident())
            return
        self._num_disagreed += 1
        if self._num_disagreed >= _NUM_TRIES:
            self._fail(f"its logits differ by {found:.1e} of the largest; {limit:.0e} is rounding")

    def _fail(self, reason: str) -> None:
        self.state = f"failed: {reason}"
        self._drop_step()

    def _drop_step(self) -> None:
        for step in filter(None, (self._step, self._coming)):
            step.close()
        self._step = None

    def _warn(self) -> None:
        if not self._warned:
            self._warned = True
            _log.warning("decoding without torch.compile, which %s", self.state)


def _reason(error: Exception) -> str:
    """One line: what torch wrapped says more than the wrapping."""
    inner = getattr(error, "inner_exception", None) or error.__cause__
    if isinstance(inner, Exception):
        return _reason(inner)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def make_compiler(
    model: PreTrainedModel, context_length: int, config: EngineConfig, progress: Callable[[str, int, int], None]
) -> DecodeCompiler | None:
    """Compile in the background for "auto", at once for "on". `config` is settled."""
    if model.config.is_encoder_decoder or config.compile == "off":
        return None
    return DecodeCompiler(
        model, context_length, background=config.compile == "auto",
        on_compile=lambda done, total: progress("compiling", done, total),
    )  # fmt: skip
