"""The choice of a token's way: the fused step where there is one that agrees, transformers' modules everywhere else.

The fused step is compared with the modules on the first tokens that it would serve, by their logits. If they differ,
the modules go on, with one warning. `path` and `reason` say which way the last token took, and why not the fast one.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import torch
from torch import nn
from torch.nn.modules import module as torch_modules

from offmoe.decode.compare import allowed_difference, difference
from offmoe.decode.families.common import spec_of
from offmoe.decode.fused import FusedStep
from offmoe.decode.spec import DecoderSpec, NoSpecError
from offmoe.hf.internals import experts_modules
from offmoe.hf.seam import ObserverHook, find_binding
from offmoe.kv.rewind import remember
from offmoe.loader.loaded import LoadedModel
from offmoe.moe.interrupt_safe import InterruptSafeExecutor

_log = logging.getLogger(__name__)

Path = Literal["fused", "eager"]
# Tokens that are computed both ways; and those of them that may differ by more than rounding, as a router does that
# nearly ties.
NUM_CHECKS, NUM_TRIES = 2, 3
# Tokens after which experts that the kernels have not computed yet are taken to be torch's.
MOST_WAITS = 4
VARIABLE = "OFFMOE_DECODE"


class ModelStep(Protocol):
    """The model's own forward: `position` tokens are in `cache`."""

    position: int

    @property
    def cache(self) -> Any:
        """The KV cache; None before the model made one."""

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """Last logits (1, V) after appending ids (1, N)."""


class DecodePaths:
    """The decode step of one engine on a CPU. `path` is the last token's; `reason` is empty for the fused one."""

    def __init__(self, loaded: LoadedModel) -> None:
        """`loaded` is whole: what hooks its model itself has now are this engine's."""
        native = loaded.native
        self._model, self._executor, self._calls = loaded.model, loaded.serving.executor, loaded.calls
        self._kernels = None if native is None else native.kernels
        self._threads = None if native is None else native.threads
        self._num_own_hooks = _num_hooks(self._model)
        self._calls.holders.add(id(self))
        self.path: Path = "eager"
        self.state = "off"  # of compiling, which nothing here does
        self.reason = ""
        self._step: FusedStep | None = None
        self._hooks: Hooks | None = None
        self._parts = _parts_of(self._model)
        self._forwards = [
            (name, vars(module), vars(module).get("forward")) for name, module in self._model.named_modules()
        ]
        self._replaced = ""
        self._agreed = self._differed = self._num_waits = 0
        self._never = self._final = ""  # reasons that hold for this engine, and until a module is replaced
        try:
            self._decoder, self._spec = self._find()
        except NoSpecError as error:
            self._never = str(error)

    def _find(self) -> tuple[Any, DecoderSpec]:
        if os.environ.get(VARIABLE) == "eager":
            raise NoSpecError(f"{VARIABLE}=eager")
        if self._kernels is None:
            raise NoSpecError("no CPU kernels")
        if not isinstance(self._executor, InterruptSafeExecutor):
            raise NoSpecError("experts are computed on a device")
        decoder: Any = self._model.get_decoder()
        if decoder is None or not hasattr(decoder, "get_input_embeddings"):
            raise NoSpecError(f"no spec for {self._model.config.model_type}")
        return decoder, spec_of(decoder.config)

    def __call__(self, forward: ModelStep, ids: torch.Tensor) -> torch.Tensor:
        """Last logits (1, V) after appending the one token `ids` (1, 1) to the cache of `forward`."""
        step = self._usable(forward.cache)
        if step is None:
            self.path = "eager"
            return self._eager(forward, ids)
        self.path, self.reason = "fused", ""
        if self._agreed < NUM_CHECKS:
            return self._check(step, forward, ids)
        with torch.inference_mode(), self._calls:
            logits = step(forward.cache, ids, forward.position)
        forward.position += 1
        return logits

    @contextmanager
    def only_eager(self, why: str) -> Iterator[None]:
        """Context in which transformers' modules compute every token, for the reason given."""
        before, self._never = self._never, why
        try:
            yield
        finally:
            self._never = before

    def begin(self, *, num_held: int) -> None:
        """A reply begins: modules may have been replaced since the last one, and weights moved to other memory. Then
        all is asked anew.
        """
        if any(table.get(name) is not part or _place(part) != place for table, name, part, place in self._parts):
            self._parts, self._step, self._final = _parts_of(self._model), None, ""
            self._agreed = self._differed = self._num_waits = 0
        replaced = (name or "the model" for name, table, own in self._forwards if table.get("forward") is not own)
        self._replaced = next(replaced, "")

    def close(self) -> None:
        """Let go of the model."""
        self._step, self._parts, self._forwards, self._never = None, [], [], "the engine is closed"

    def _eager(self, forward: ModelStep, ids: torch.Tensor) -> torch.Tensor:
        return forward(ids) if self._threads is None else self._threads.run_token(forward, ids)

    def _usable(self, cache: Any) -> FusedStep | None:
        """The fused step if it can compute the next token; else None, and `reason` says why."""
        if not self._never and not self._final and self._step is None:
            self._make()
        if self._never or self._final or self._step is None:
            self.reason = self._never or self._final or self.reason
            return None
        assert self._hooks is not None
        if self._replaced:
            self.reason = f"the forward of {self._replaced} was replaced"
            return None
        if not self._hooks.may_pass or _num_hooks(self._model) != self._num_own_hooks:
            self.reason = f"hooks on {self._hooked()}"
            return None
        if not self._step.takes(cache):
            self.reason = "the KV cache or the experts are not this engine's"
            return None
        return self._step

    def _make(self) -> None:
        """The step, once the kernels have computed some experts of every layer, as a prompt makes them do."""
        assert isinstance(self._executor, InterruptSafeExecutor) and self._kernels is not None
        experts = self._executor.joined()
        bindings = [find_binding(module) for _, module in experts_modules(self._model)]
        if experts is None or not all(b and b.math and experts.knows(b.layer_idx, b.math) for b in bindings):
            self._num_waits += 1
            self.reason = "experts are computed by torch"
            self._final = self.reason if self._num_waits > MOST_WAITS else ""
            return
        try:
            attention = getattr(self._decoder.config, "_attn_implementation", None)
            if attention not in ("sdpa", "eager") and not str(attention).startswith("offmoe"):
                raise NoSpecError(f"attention is {attention}")
            self._step = FusedStep(self._model, self._decoder, self._spec, self._executor, experts, self._kernels)
        except (NoSpecError, AttributeError) as error:
            self._final = str(error) if isinstance(error, NoSpecError) else f"another layout: {error}"
            return
        told = [module for layer in self._step.layers for module, _ in layer.seen_by]
        inside = [module for module in self._model.modules() if module is not self._model]
        self._hooks = Hooks(inside, told)

    def _hooked(self) -> str:
        """The first module with hooks that the step would pass by."""
        if _num_hooks(self._model) != self._num_own_hooks:
            return "the model"
        told = {id(module) for layer in self._step.layers for module, _ in layer.seen_by} if self._step else set()
        for name, module in self._model.named_modules():
            hooks = Hooks((), (module,)) if id(module) in told else Hooks((module,))
            if name and _num_hooks(module) and not hooks.may_pass:
                return str(name)
        return "all modules"

    def _check(self, step: FusedStep, forward: ModelStep, ids: torch.Tensor) -> torch.Tensor:
        """Both ways, the fused one last: what it writes stays, as it does for all tokens that follow."""
        cache, position = forward.cache, forward.position
        rewind = remember(cache)
        expected = self._eager(forward, ids)
        if not math.isfinite(float(expected.amax())):  # of which the reply will be told
            return expected
        rewind()
        rewind = remember(cache)
        assert isinstance(self._executor, InterruptSafeExecutor)
        try:
            with torch.inference_mode(), self._calls, self._executor.unrecorded():
                logits = step(cache, ids, position, count=False)
        except NoSpecError as error:  # the cache is of another shape than the layers
            logits, self._final = torch.full_like(expected, math.nan), str(error)
        found, allowed = difference(logits, expected), allowed_difference(self._model.dtype)
        if found <= allowed:
            self._agreed += 1
            return logits
        rewind()
        forward.position = position
        with self._executor.unrecorded():
            expected = self._eager(forward, ids)
        self.path, self.reason = "eager", self._final or f"logits differ by {found:.1e} of the largest"
        self._differed += not self._final
        if self._differed > NUM_TRIES - NUM_CHECKS:
            self._give_up(found, allowed)
        return expected

    def _give_up(self, found: float, allowed: float) -> None:
        name: str = self._decoder.config.model_type
        self._step, self._final = None, f"logits differ by {found:.1e} of the largest (allowed {allowed:.0e})"
        _log.warning(
            "decoding of %s goes through transformers' modules: on the fused path %s; please report it", name,
            self._final,
        )  # fmt: skip


class Hooks:
    """The hooks of `modules` and of `told`, and those that torch calls for every module."""

    def __init__(self, modules: Iterable[nn.Module], told: Sequence[nn.Module] = ()) -> None:
        """`told`: modules whose ObserverHooks the step tells itself."""
        self._tables: list[dict[int, Any]] = [
            torch_modules._global_forward_hooks, torch_modules._global_forward_pre_hooks,
        ]  # fmt: skip
        for module in dict.fromkeys(modules):
            if module not in told:
                self._tables += [module._forward_hooks, module._forward_pre_hooks]
        self._tables += [module._forward_hooks for module in told]
        self._told: list[dict[int, Any]] = [module._forward_pre_hooks for module in told]

    @property
    def may_pass(self) -> bool:
        """Nobody but who can be told would be called."""
        return not any(self._tables) and all(
            isinstance(hook, ObserverHook) for table in self._told for hook in table.values()
        )


def _parts_of(model: nn.Module) -> list[tuple[dict[str, Any], str, Any, int]]:
    """Every module and parameter of the model: the table it stands in, its name there, itself, and its memory."""
    return [
        (table, name, part, _place(part))
        for module in model.modules()
        for table in (module._modules, module._parameters)
        for name, part in table.items()
    ]


def _place(part: Any) -> int:
    place: int = part.data_ptr() if isinstance(part, torch.Tensor) and not part.is_meta else 0
    return place


def _num_hooks(module: nn.Module) -> int:
    return len(module._forward_hooks) + len(module._forward_pre_hooks)
