"""One decode step through torch.compile: the whole model as one graph, cut on CUDA at experts that may be missing.

A step of one token is bound by the host, which launches some twenty kernels a layer: a compiled step has few, and on
CUDA what lies between two cuts is replayed as one CUDA graph. Layers whose experts are all on the device are no cut.

Compiled code is kept on disk by torch: in `TORCHINDUCTOR_CACHE_DIR`, or else in `torchinductor_<user>` in the system's
temporary folder.
"""

from __future__ import annotations

import inspect
import itertools
import threading
import types
import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch

from offmoe.attention.grouped import group_attention
from offmoe.decode.compile_thread import interruptible
from offmoe.decode.process_state import ProcessState
from offmoe.hf.door import PreTrainedModel
from offmoe.hf.internals import cache_name
from offmoe.hf.seam import LayerBinding, binding_of_handle, define_experts_operators, is_observed
from offmoe.kv.static_cache import StaticKv
from offmoe.moe.resident import ResidentExecutor

# A lowering takes a graph and example inputs and returns what runs it: a torch.compile backend.
Lowering = Callable[[torch.fx.GraphModule, Sequence[torch.Tensor]], Callable[..., Any]]


def lower_with_inductor(graph: torch.fx.GraphModule, inputs: Sequence[torch.Tensor]) -> Callable[..., Any]:
    """torch's own compiler. On CUDA, graphs between the operators that are marked as unsafe for them."""
    from torch._inductor.compile_fx import compile_fx

    on_cuda = any(isinstance(tensor, torch.Tensor) and tensor.is_cuda for tensor in inputs)
    # Round where the model's own code rounds: fused bfloat16 kernels keep more, and then choose other experts.
    patches: dict[str, Any] = {"emulate_precision_casts": True}
    if on_cuda:
        patches |= {"triton.cudagraphs": True, "graph_partition": True}
    compiled: Any = compile_fx(graph, inputs, config_patches=patches)
    return compiled  # type: ignore[no-any-return]


class _Compiled(Exception):  # noqa: N818 - no error: the end of a call that was made to compile and not to run
    pass


class _Backend:
    """The backend that torch.compile calls with the captured graph. torch keeps it for ever, so it knows no model."""

    def __init__(self, lower: Lowering) -> None:
        self.lower: Lowering | None = lower
        self.run: Callable[..., Any] | None = None
        self.only_compile = True
        self.num_blind = 0
        self.resident: list[ResidentCall] = []
        self.state: ProcessState | None = None

    def __call__(self, graph: torch.fx.GraphModule, inputs: Sequence[torch.Tensor]) -> Callable[..., Any]:
        lower, self.lower = self.lower, None
        assert lower is not None, "closed, or a step was compiled a second time"
        group_attention(graph)
        self.num_blind, self.resident = count_blind(graph), resident_calls(graph)
        self.run = lower(graph, inputs)
        self.state = ProcessState()
        return self._run

    def _run(self, *args: Any) -> Any:
        if self.only_compile:
            raise _Compiled
        assert self.run is not None, "closed"
        return self.run(*args)


class CompiledStep:
    """A step of one token against `static`. Does nothing until `compile()`, which may run on any thread."""

    def __init__(self, model: PreTrainedModel, static: StaticKv, lower: Lowering) -> None:
        define_experts_operators()
        self.static = static
        self._model = weakref.ref(model)
        self.on_cuda = static.position.is_cuda
        self._ids = torch.zeros((1, 1), dtype=torch.long, device=static.position.device)
        torch._dynamo.mark_static_address(self._ids)
        self._backend = _Backend(lower)
        # Guards ask whether the code still fits. It does: modules, cache and shapes are this object's own, so the
        # thousands of checks a call (a millisecond and more) are left out.
        self._function = torch.compile(
            _as_new_code(_make_step(model, static, self._ids)), fullgraph=True, dynamic=False, backend=self._backend,
            options={"guard_filter_fn": torch.compiler.skip_all_guards_unsafe},
        )  # fmt: skip

    @property
    def num_blind(self) -> int:
        """Layers whose lookahead sees no state in this step."""
        return self._backend.num_blind

    @property
    def fits(self) -> bool:
        """Whether the experts that the graph computes by itself are still served as when it was captured."""
        return all(call.binding.executor is call.executor for call in self._backend.resident)

    @torch.inference_mode()
    def compile(self) -> None:
        """Compile without running anything. Raises whatever torch.compile raises."""
        model = self._model()
        assert model is not None, "closed"
        with suppress(_Compiled), interruptible():
            self._function()
        if self._backend.state is not None:
            self._backend.state.put_back()
        self._backend.only_compile = False

    def close(self) -> None:
        """Let go of what was compiled. A compilation under way fails at its next stage."""
        self._backend.lower = self._backend.run = None
        self._backend.resident = []

    @torch.inference_mode()
    def __call__(self, ids: torch.Tensor, position: int) -> torch.Tensor:
        """Last logits (1, V) of the token `ids` (1, 1) at `position`, in memory of their own."""
        self._ids.copy_(ids)
        self.static.seek(position)
        if self.on_cuda:
            _enter_cudagraph_thread()
            torch.compiler.cudagraph_mark_step_begin()
        logits: torch.Tensor = self._function()
        for call in self._backend.resident:  # a graph that is replayed runs no Python
            call.executor.count_hits(call.num_choices)
        return logits.clone()


class ResidentCall(NamedTuple):
    """An experts call that a graph makes without the host, of `num_choices` experts."""

    binding: LayerBinding
    executor: ResidentExecutor
    num_choices: int


def count_blind(graph: torch.fx.GraphModule) -> int:
    """Experts calls of a captured graph that somebody would observe, and that are given no state to show."""
    calls = [node.args for node in _calls(graph, torch.ops.offmoe.experts)]
    return sum(is_observed(handle) and state is None for _, _, _, handle, state in calls)


def resident_calls(graph: torch.fx.GraphModule) -> list[ResidentCall]:
    """The experts calls of a captured graph that need no host."""
    found: list[ResidentCall] = []
    for node in _calls(graph, torch.ops.offmoe.resident_experts):
        binding = binding_of_handle(node.args[3])
        executor = binding.executor
        assert isinstance(executor, ResidentExecutor), f"{binding=}"
        found.append(ResidentCall(binding, executor, node.args[1].meta["example_value"].numel()))
    return found


def _calls(graph: torch.fx.GraphModule, operator: Any) -> list[Any]:
    """The nodes, whose arguments torch types as anything that a graph may hold."""
    return [node for node in graph.graph.nodes if node.target in (operator, operator.default)]


def _make_step(model: PreTrainedModel, static: StaticKv, ids: torch.Tensor) -> Callable[[], torch.Tensor]:
    accepted = inspect.signature(model.forward).parameters
    takes_positions = "position_ids" in accepted
    options = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
    cache = {cache_name(model): static.cache}

    def step() -> torch.Tensor:
        positions = {"position_ids": static.position.view(1, 1)} if takes_positions else {}
        output = model(input_ids=ids, use_cache=True, **cache, **positions, **options)
        logits: torch.Tensor = output.logits[:, -1]
        return logits

    return step


_code_number = itertools.count()


def _as_new_code(function: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """The same function with code and globals of its own: that is where torch keeps, and counts, what it compiled."""
    code = function.__code__.replace(co_name=f"offmoe_step_{next(_code_number)}")
    return types.FunctionType(code, dict(function.__globals__), code.co_name, None, function.__closure__)


def _enter_cudagraph_thread() -> None:
    """torch before 2.13 keeps its CUDA graph managers for the thread that imported it; any other one needs its own."""
    from torch._inductor import cudagraph_trees

    if hasattr(cudagraph_trees.local, "tree_manager_containers"):
        return
    if not torch._C._is_key_in_tls("tree_manager_containers"):
        torch._C._stash_obj_in_tls("tree_manager_containers", {})
        torch._C._stash_obj_in_tls("tree_manager_locks", defaultdict(threading.Lock))
