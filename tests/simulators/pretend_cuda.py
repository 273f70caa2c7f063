"""CUDA played on the CPU, for tests: tensors say "cuda" and hold real numbers, and three things are watched.

- Devices: an operation that mixes them as CUDA refuses to is a DeviceMixError.
- Waits: `waits` counts what makes the host wait for the device, by its place in offmoe or transformers.
- Order: `races` lists reads and writes of a watched slab that streams, events and waits do not put in order
  (stream_clocks.py). Events turn out to be late at random.

What is queued happens at once, so results are right even where the order is not. Kernels of Triton are not played.
"""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stream_clocks import Event, Span, Stream, World, enter, leave, present, where
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

CUDA = torch.device("cuda", 0)
MEMORY_BYTES = 8 << 30
aten = torch.ops.aten
# The host reads numbers, so it waits.
READERS = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten._unique2)
INDEXERS = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index)
# What a CPU-only torch lacks to let a tensor say "cuda": someone to switch devices.
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
static c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> guard;
static c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, &guard);
"""


class DeviceMixError(RuntimeError):
    pass


class Pretend(torch.Tensor):
    @staticmethod
    def __new__(cls, data: torch.Tensor) -> Pretend:
        with torch.inference_mode(False):
            return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined,no-any-return]
                cls, data.size(), strides=data.stride(), storage_offset=data.storage_offset(), dtype=data.dtype,
                layout=data.layout, device=CUDA,
            )  # fmt: skip

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __init__(self, data: torch.Tensor) -> None:
        self.data_on_cpu = data

    def __repr__(self, **_: Any) -> str:
        return f"<cuda {tuple(self.shape)}>"

    def data_ptr(self) -> int:
        return self.data_on_cpu.data_ptr()

    def tolist(self) -> Any:
        present().wait("tolist")
        return self.data_on_cpu.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Mode(TorchDispatchMode):
    """For operations whose tensors are all on the CPU, or that have none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def raw(value: Any) -> Any:
    return value.data_on_cpu if isinstance(value, Pretend) else value


def span(tensor: torch.Tensor, *, writes: bool) -> Span:
    data = raw(tensor)
    last = sum((count - 1) * stride for count, stride in zip(data.shape, data.stride(), strict=True))
    return data.data_ptr(), data.data_ptr() + (1 + last) * data.itemsize if data.numel() else data.data_ptr(), writes


def run(func: Any, args: Any, kwargs: Any) -> Any:
    flat, _ = tree_flatten((args, kwargs))
    on_cuda = [value for value in flat if isinstance(value, Pretend)]
    if not (on_cuda or kwargs.get("pin_memory") or any(isinstance(v, torch.device) and v.type == "cuda" for v in flat)):
        return func(*args, **kwargs)
    given = dict(zip([a.name for a in func._schema.arguments], args, strict=False)) | kwargs
    if func.overloadpacket is aten.copy_:
        return copy_(given["self"], given["src"], waits=not given.get("non_blocking"))
    if func.overloadpacket in (aten.to, aten._to_copy):
        return move(given)
    on_cpu = [v for v in flat if isinstance(v, torch.Tensor) and not isinstance(v, Pretend) and v.dim()]
    if func.overloadpacket in INDEXERS:
        indices = [index for index in given["indices"] if index is not None]
        if any(not isinstance(i, Pretend) or i.dtype == torch.bool for i in indices):
            present().wait("index")
        on_cpu = [t for t in on_cpu if not any(t is index for index in indices)]
        if not isinstance(given["self"], Pretend):
            raise DeviceMixError(f"{func} of a CPU tensor by an index on the device, in {where()}")
    if on_cuda and on_cpu:
        raise DeviceMixError(f"{func} of {[*map(tuple, (t.shape for t in on_cpu))]} on the CPU, in {where()}")
    if func.overloadpacket in READERS:
        present().wait(str(func.overloadpacket))
    return compute(func, args, kwargs, on_cuda)


def compute(func: Any, args: Any, kwargs: Any, on_cuda: list[Pretend]) -> Any:
    world = present()
    if on_cuda and not any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns):
        named = [*zip(func._schema.arguments, args, strict=False)]
        named += [(a, kwargs[a.name]) for a in func._schema.arguments if a.name in kwargs]
        spans = [
            span(tensor, writes=argument.alias_info is not None and argument.alias_info.is_write)
            for argument, value in named
            for tensor in tree_flatten(value)[0]
            if isinstance(tensor, Pretend)
        ]
        world.on_stream(*spans)
    device = kwargs.get("device")
    is_pinned = kwargs.get("pin_memory")
    changed = {"device": torch.device("cpu")} if device is not None else {}
    changed |= {"pin_memory": False} if is_pinned else {}
    output = func(*tree_map(raw, args), **{**tree_map(raw, kwargs), **changed})
    if is_pinned:
        return world.pin(output)
    if device is not None and torch.device(device).type == "cpu":
        return output
    known = {id(raw(tensor)): tensor for tensor in on_cuda}

    def wrapped(value: Any) -> Any:
        if type(value) is not torch.Tensor:
            return value
        return known[id(value)] if id(value) in known else Pretend(value)

    return tree_map(wrapped, output)


def copy_(dst: torch.Tensor, src: torch.Tensor, *, waits: bool) -> torch.Tensor:
    present().on_stream(span(src, writes=False), span(dst, writes=True))
    raw(dst).copy_(raw(src))
    crosses = isinstance(dst, Pretend) != isinstance(src, Pretend)
    if crosses and (waits or (isinstance(src, Pretend) and not present().is_pinned(dst))):
        present().wait("copy_")
    return dst


def move(given: dict[str, Any]) -> torch.Tensor:
    tensor, like = given["self"], given.get("other")
    target = torch.device(given.get("device") or (tensor if like is None else like).device).type
    dtype = given.get("dtype") or (tensor if like is None else like).dtype
    data = raw(tensor).to(dtype, copy=True)
    if target == tensor.device.type:
        return Pretend(data) if target == "cuda" else data
    present().on_stream(span(tensor, writes=False))
    if not given.get("non_blocking") or target == "cpu":
        present().wait(f"to({target})")
    return Pretend(data) if target == "cuda" else data


def load_guard(folder: Path) -> None:
    """Lets tensors of a CPU-only torch say "cuda", in this process. Skips the test where nothing can be compiled, or
    where torch is built for CUDA and would ask for its driver.
    """
    if torch.backends.cuda.is_built():
        pytest.skip("this torch is built for CUDA: its own code would look for the driver")
    compiler, include = shutil.which("g++"), Path(torch.__path__[0]) / "include"
    if compiler is None:
        pytest.skip("no C++ compiler")
    (folder / "guard.cpp").write_text(GUARD)
    command = [compiler, "-shared", "-fPIC", "-std=c++20", f"-I{include}", "guard.cpp", "-o", "guard.so"]
    command += [f"-L{include.parent / 'lib'}", "-lc10"]
    subprocess.run(command, cwd=folder, check=True)
    torch.ops.load_library(str(folder / "guard.so"))


def _to_cuda(module: torch.nn.Module, *args: Any, **_: Any) -> torch.nn.Module:
    moved: dict[int, torch.nn.Parameter] = {}
    for part in module.modules():
        for name, param in part._parameters.items():
            if param is not None and not isinstance(param, Pretend):
                new = moved.setdefault(id(param), torch.nn.Parameter(Pretend(param.detach()), requires_grad=False))
                part._parameters[name] = new
        for name, buffer in part._buffers.items():
            if buffer is not None and not isinstance(buffer, Pretend):
                part._buffers[name] = Pretend(buffer.detach())
    return module


@contextlib.contextmanager
def pretend_cuda(patch: pytest.MonkeyPatch, *, seed: int = 0, late: float = 0.7) -> Iterator[World]:
    """Within, on this thread, there is a CUDA device. `late`: of the events, those that are not done at first sight."""
    world, real_generator = World(seed, late), torch.Generator

    @contextlib.contextmanager
    def use(stream: Stream) -> Iterator[None]:
        before, world.per_thread.stream = world.current, stream
        yield
        world.per_thread.stream = before

    def watched(call: Callable[..., Any], spans: Callable[..., list[Span]]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            world.on_host(*spans(*args))
            return call(*args, **kwargs)

        return called

    runtime = SimpleNamespace(
        cudaHostRegister=lambda begin, num_bytes, flags: world.pinned.append((begin, begin + num_bytes)) or 0,
        cudaHostUnregister=lambda begin: 0, cudaError=SimpleNamespace(success=0),
    )  # fmt: skip
    for name, value in {
        "is_available": lambda: True, "_lazy_init": lambda: None, "device_count": lambda: 1, "Stream": Stream,
        "get_device_name": lambda index: "pretended", "Event": Event, "current_stream": lambda device: world.current,
        "stream": use, "device": lambda device: contextlib.nullcontext(), "cudart": lambda: runtime,
        "synchronize": lambda device: world.wait("synchronize"), "empty_cache": lambda: None,
        "mem_get_info": lambda device: (MEMORY_BYTES, MEMORY_BYTES), "memory_reserved": lambda device: 0,
        "memory_allocated": lambda device: 0, "max_memory_reserved": lambda device: 0,
    }.items():  # fmt: skip
        patch.setattr(torch.cuda, name, value)
    patch.setattr(torch.backends.cuda, "is_built", lambda: True)
    patch.setattr(torch, "Generator", lambda device="cpu": real_generator())
    patch.setattr(torch.Tensor, "pin_memory", lambda tensor: world.pin(tensor.clone()))
    move_bytes = watched(ctypes.memmove, lambda dst, src, num: [(src, src + num, False), (dst, dst + num, True)])
    patch.setattr(ctypes, "memmove", move_bytes)
    patch.setattr(torch.nn.Module, "to", _to_cuda)
    patch.setattr("transformers.PreTrainedModel.to", _to_cuda)
    patch.setattr("offmoe.loader.resident._move_parameters", lambda model, device: None)
    enter(world)
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with Mode():
            yield world
    finally:
        torch._C._set_only_lift_cpu_tensors(before)
        leave()
