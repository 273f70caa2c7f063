"""Fail the n-th call, n = 1, 2, ... until an operation needs fewer: every place where the system may say no is tried.

The idea is SQLite's (sqlite.org/testing.html, "Anomaly testing"). A `Seam` is one kind of call: opening and reading
files, writing them, mapping memory, tensors, the kernels' own memory, starting threads, copies. `each_nth` runs an
operation once for every n; the n-th call through the seam fails as the operating system or torch would fail it, and the
caller checks what came of it. Files outside `root` are left alone, so that Python and pytest keep working.
"""

from __future__ import annotations

import builtins
import errno
import io
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from logs import collected
from torch.utils._python_dispatch import TorchDispatchMode

from offmoe.core.errors import OffmoeError
from offmoe.kernels.cpu.kernels import CpuKernels
from offmoe.tiers import throttled

OUT_OF_MEMORY = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "4096 bytes. Error code 12 (Cannot allocate memory)"
)


class Gate:
    """Counts calls through a seam; the `nth` fails, and with `lasting` all that follow it. Used by several threads."""

    def __init__(self, nth: int, *, lasting: bool = False) -> None:
        self._nth, self._lasting = nth, lasting
        self._lock = threading.Lock()
        self.calls = 0
        self.failed: list[str] = []

    def fails(self, what: str) -> bool:
        """Count one call, named for reports."""
        with self._lock:
            self.calls += 1
            now = self.calls == self._nth or (self._lasting and self.calls > self._nth)
            if now and len(self.failed) < 20:
                self.failed.append(what)
        return now


Install = Callable[[pytest.MonkeyPatch, Gate, Path], AbstractContextManager[None] | None]


@dataclass(frozen=True)
class Seam:
    """A kind of call. `install` puts the gate in its way until the patch is undone and what it returns was left."""

    name: str
    install: Install = field(repr=False)

    @contextmanager
    def guarded_by(self, gate: Gate, root: Path) -> Iterator[None]:
        """Within: calls go through `gate`."""
        with pytest.MonkeyPatch.context() as patch, self.install(patch, gate, root) or nullcontext():
            yield


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One run with one failed call. `error` is None where the operation did without that call."""

    nth: int
    failed: tuple[str, ...]
    error: BaseException | None
    result: Any


def each_nth(
    operation: Callable[[], Any], seam: Seam, root: Path, *, stride: int = 1, first: int = 1, lasting: bool = False,
    most: int = 100_000,
) -> Iterator[Outcome]:  # fmt: skip
    """Outcomes for n = first, first + stride, ... until the operation makes fewer than n calls.

    OffmoeError is an outcome; any other exception is one too, for the caller to refuse.
    """
    for nth in range(first, most, stride):
        gate = Gate(nth, lasting=lasting)
        error: BaseException | None = None
        result = None
        with collected(), seam.guarded_by(gate, root):  # a fallback may say so
            try:
                result = operation()
            except Exception as caught:  # noqa: BLE001 - judged by the caller
                error = caught
        if not gate.failed:
            if error is not None:
                raise error
            return
        yield Outcome(nth=nth, failed=tuple(gate.failed), error=error, result=result)
        result = error = None


def check_refusal(outcome: Outcome) -> str:
    """The one line that a user sees of a failure; AssertionError for a traceback."""
    assert isinstance(outcome.error, OffmoeError), f"{outcome.failed} became {outcome.error!r}"
    text = str(outcome.error)
    assert text.isprintable() and len(text) > 20, f"{text=}"
    return text


# Files.


class _WatchedFile(io.FileIO):
    """A file whose reads or writes go through a gate."""

    def __init__(self, file: Any, mode: str, gate: Gate, opener: Any = None, closefd: bool = True) -> None:
        self._gate, self._writes = gate, any(letter in mode for letter in "wax+")
        super().__init__(file, mode, closefd=closefd, opener=opener)

    def _pass(self, what: str) -> None:
        code = errno.ENOSPC if self._writes else errno.EIO
        if self._gate.fails(f"{what} {self.name}"):
            raise OSError(code, os.strerror(code))

    def readinto(self, buffer: Any) -> int | None:
        self._pass("read")
        return super().readinto(buffer)

    def read(self, size: int | None = -1) -> bytes:  # type: ignore[override]
        self._pass("read")
        return super().read(-1 if size is None else size)  # type: ignore[return-value]

    def readall(self) -> bytes:
        self._pass("read")
        return super().readall()  # type: ignore[return-value]

    def write(self, data: Any) -> int:  # type: ignore[override]
        self._pass("write")
        return super().write(data)  # type: ignore[return-value]


def _opened(
    path: Any, mode: str, buffering: int, encoding: str | None, errors: str | None, newline: str | None, closefd: bool,
    opener: Any, gate: Gate,
) -> Any:  # fmt: skip
    """As io.open does it, over a watched file."""
    raw_mode = "".join(letter for letter in mode if letter not in "tb")
    raw = _WatchedFile(path, raw_mode, gate, opener, closefd)
    if buffering == 0:
        return raw
    if "+" in raw_mode:
        buffered: Any = io.BufferedRandom(raw)
    elif raw_mode == "r":
        buffered = io.BufferedReader(raw)
    else:
        buffered = io.BufferedWriter(raw)
    return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding or "utf-8", errors, newline)


def _below(path: Any, root: Path) -> bool:
    try:
        is_number = isinstance(path, int)
        found = Path(f"/proc/self/fd/{path}").readlink() if is_number else Path(os.fsdecode(path)).absolute()
    except (OSError, TypeError):
        return False
    return found.is_relative_to(root)


def _watch_open(patch: pytest.MonkeyPatch, gate: Gate, root: Path, *, writing: bool) -> None:
    real = io.open

    def watched_open(
        file: Any, mode: str = "r", buffering: int = -1, encoding: str | None = None, errors: str | None = None,
        newline: str | None = None, closefd: bool = True, opener: Any = None,
    ) -> Any:  # fmt: skip
        if any(letter in mode for letter in "wax+") != writing or not _below(file, root):
            return real(file, mode, buffering, encoding, errors, newline, closefd, opener)
        if not isinstance(file, int) and gate.fails(f"open {file}"):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(file))
        return _opened(file, mode, buffering, encoding, errors, newline, closefd, opener, gate)

    patch.setattr(builtins, "open", watched_open)
    patch.setattr(io, "open", watched_open)


def _gated(patch: pytest.MonkeyPatch, gate: Gate, module: Any, name: str, error: Callable[[], BaseException]) -> None:
    real = getattr(module, name)

    def call(*args: Any, **options: Any) -> Any:
        if gate.fails(name):
            raise error()
        return real(*args, **options)

    patch.setattr(module, name, call)


def _os_error(code: int) -> Callable[[], OSError]:
    return lambda: OSError(code, os.strerror(code))


def _install_reads(patch: pytest.MonkeyPatch, gate: Gate, root: Path) -> None:
    _watch_open(patch, gate, root, writing=False)
    _gated(patch, gate, os, "preadv", _os_error(errno.EIO))
    _watch_os_open(patch, gate, root, writing=False)


def _watch_os_open(patch: pytest.MonkeyPatch, gate: Gate, root: Path, *, writing: bool) -> None:
    real = os.open

    def watched(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if bool(flags & (os.O_WRONLY | os.O_RDWR)) == writing and _below(path, root) and gate.fails(f"os.open {path}"):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))
        return real(path, flags, *args, **options)

    patch.setattr(os, "open", watched)


def _install_writes(patch: pytest.MonkeyPatch, gate: Gate, root: Path) -> None:
    _watch_open(patch, gate, root, writing=True)
    _watch_os_open(patch, gate, root, writing=True)
    for name in ("fsync", "truncate", "ftruncate", "sendfile"):
        _gated(patch, gate, os, name, _os_error(errno.ENOSPC))
    for name in ("replace", "rename", "mkdir", "unlink"):
        real = getattr(os, name)

        def watched(path: Any, *args: Any, name: str = name, real: Any = real, **options: Any) -> Any:
            if _below(path, root) and gate.fails(f"{name} {path}"):
                raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return real(path, *args, **options)

        patch.setattr(os, name, watched)


# Memory.


def _install_maps(patch: pytest.MonkeyPatch, gate: Gate, root: Path) -> None:
    _gated(patch, gate, mmap, "mmap", _os_error(errno.ENOMEM))


class _FailingTensors(TorchDispatchMode):
    """The n-th operation that makes a tensor in RAM fails as torch's allocator does."""

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self._gate = gate

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        schema = func._schema
        makes = all(item.alias_info is None for item in schema.returns) and bool(schema.returns)
        if makes and not _on_meta(args, kwargs) and self._gate.fails(str(func)):
            raise RuntimeError(OUT_OF_MEMORY)
        return func(*args, **(kwargs or {}))


def _on_meta(args: Any, kwargs: Any) -> bool:
    device = (kwargs or {}).get("device")
    if device is not None and torch.device(device).type == "meta":
        return True
    return any(isinstance(arg, torch.Tensor) and arg.device.type == "meta" for arg in args)


def _install_tensors(patch: pytest.MonkeyPatch, gate: Gate, root: Path) -> AbstractContextManager[None]:
    return _FailingTensors(gate)


def _install_kernels(patch: pytest.MonkeyPatch, gate: Gate, root: Path) -> None:
    """The kernels say that they got no memory: through `_call`, and of a run of layers by its number."""
    real, real_run = CpuKernels._call, CpuKernels.run_program

    def call(self: CpuKernels, function: Any, address: int, what: str) -> None:
        if gate.fails(what):
            raise MemoryError(f"no memory for {what}")
        real(self, function, address, what)

    def run(self: CpuKernels, address: int) -> int:
        if gate.fails("a token's layers"):
            raise MemoryError("no memory for a token's layers")
        return real_run(self, address)

    patch.setattr(CpuKernels, "_call", call)
    patch.setattr(CpuKernels, "run_program", run)


def _install_threads(patch: pytest.MonkeyPatch, gate: Gate, root: Path) -> None:
    _gated(patch, gate, threading.Thread, "start", lambda: RuntimeError("can't start new thread"))


def _install_copies(patch: pytest.MonkeyPatch, gate: Gate, root: Path) -> None:
    """Copies to and from a simulated device fail as a lost device does."""
    _gated(patch, gate, throttled, "move_bytes", lambda: torch.AcceleratorError("CUDA error: unspecified failure"))


READS = Seam("reads", _install_reads)
WRITES = Seam("writes", _install_writes)
MAPS = Seam("maps", _install_maps)
TENSORS = Seam("tensors", _install_tensors)
KERNELS = Seam("kernels", _install_kernels)
THREADS = Seam("threads", _install_threads)
COPIES = Seam("copies", _install_copies)
SEAMS = (READS, WRITES, MAPS, TENSORS, KERNELS, THREADS, COPIES)


def holdings() -> tuple[list[str], list[str]]:
    """Names of this process's engine threads and of the regular files it has open, each as often as it is there."""
    threads = sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("offmoe"))
    files = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            name = str(descriptor.readlink())
            files.append(name if name.startswith("/") and not name.startswith(("/proc", "/dev")) else "")
    return threads, sorted(filter(None, files))
