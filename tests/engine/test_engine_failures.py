"""What goes wrong while an engine runs: Ctrl-C at any moment, a failing drive, a file that changes under it."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from engines import PROMPT, assert_at_rest, engine_threads, leaves_nothing, open_checkpoint_files, open_tiny, save_tiny
from makers import one_line
from patience import PATIENCE_S

import offmoe
from offmoe.checkpoint.shard_file import ShardFile
from offmoe.core.errors import CheckpointChangedError, CheckpointError, DiskReadError

NUM_NEW = 6


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(source, tmp_path / "model"))


@pytest.fixture(scope="module")
def expected(source: Path) -> tuple[int, ...]:
    with open_tiny(source) as engine:
        return engine.generate(PROMPT, max_new_tokens=NUM_NEW).token_ids


def on_read(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[ShardFile], None]) -> None:
    """Do `act` in the disk thread at the read with this number."""
    read_into, lock = ShardFile.read_into, threading.Lock()
    left = number

    def read(file: ShardFile, view: memoryview, start: int, **options: Any) -> None:
        nonlocal left
        with lock:
            left -= 1
            now = left == 0
        if now:
            act(file)
        read_into(file, view, start, **options)

    monkeypatch.setattr(ShardFile, "read_into", read)


def raises(error: BaseException) -> Callable[[ShardFile], None]:
    def act(file: ShardFile) -> None:
        raise error

    return act


@pytest.mark.parametrize("number", [1, 4, 9])
def test_ctrl_c_in_a_read(
    source: Path, expected: tuple[int, ...], number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real signal, sent from the disk thread while the main thread waits for it."""
    with leaves_nothing(), open_tiny(source) as engine:
        with monkeypatch.context() as patch:
            main = threading.main_thread().ident
            assert main is not None
            on_read(patch, number, lambda file: signal.pthread_kill(main, signal.SIGINT))
            with pytest.raises(KeyboardInterrupt):
                engine.generate(PROMPT, max_new_tokens=NUM_NEW)
        assert_at_rest(engine)
        assert engine.generate(PROMPT, max_new_tokens=NUM_NEW).token_ids == expected


class Interruptor:
    """A trace function that raises KeyboardInterrupt at one line of the code that keeps the cache's books."""

    FILES = ("executor.py", "expert_cache.py", "slots.py", "policy.py", "disk.py", "copier.py")

    def __init__(self, line: int) -> None:
        self._left = line
        self.where = ""

    def __call__(self, frame: FrameType, event: str, arg: object) -> Any:
        path = Path(frame.f_code.co_filename)
        return self._count if path.name in self.FILES and path.parts[-3] == "offmoe" else None

    def _count(self, frame: FrameType, event: str, arg: object) -> Any:
        self._left -= event == "line"
        if self._left == 0:
            self._left, self.where = -1, f"{frame.f_code.co_filename}:{frame.f_lineno}"
            raise KeyboardInterrupt
        return self._count


def interrupted_at(engine: offmoe.Engine, line: int) -> str:
    """Where the interrupt struck; empty when the call had fewer lines."""
    interruptor, previous = Interruptor(line), sys.gettrace()
    sys.settrace(interruptor)
    try:
        engine.generate(PROMPT, max_new_tokens=1, reuse=False)
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(previous)
    return interruptor.where


def test_ctrl_c_between_any_two_lines(source: Path, expected: tuple[int, ...]) -> None:
    with leaves_nothing(), open_tiny(source) as engine:
        engine.generate(PROMPT, max_new_tokens=NUM_NEW)
        line = 1
        struck = []
        while where := interrupted_at(engine, line):
            struck.append(where)
            assert_at_rest(engine)
            assert engine.generate(PROMPT, max_new_tokens=NUM_NEW).token_ids == expected, where
            line += 13  # a prime: over the calls of a run, different lines of each function are struck
        assert len(struck) > 30 and len({where.rpartition(":")[0] for where in struck}) >= 4, struck


@pytest.mark.parametrize("number", [1, 3, 12])
def test_a_drive_that_fails_once(
    source: Path, expected: tuple[int, ...], number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    failure = DiskReadError("reading model.safetensors at byte 0 failed: Input/output error; check the drive")
    with leaves_nothing(), open_tiny(source) as engine:
        with monkeypatch.context() as patch:
            on_read(patch, number, raises(failure))
            with pytest.raises(DiskReadError, match=r"model\.safetensors at byte"):
                engine.generate(PROMPT, max_new_tokens=NUM_NEW)
        assert_at_rest(engine)
        assert engine.generate(PROMPT, max_new_tokens=NUM_NEW).token_ids == expected


def test_an_error_of_the_system_names_the_file(
    source: Path, expected: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> int:
        raise OSError(5, "Input/output error")

    with leaves_nothing(), open_tiny(source) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", fail)
            with pytest.raises(
                DiskReadError, match=r"model\.safetensors at byte \d+ failed: Input/output error"
            ) as caught:
                engine.generate(PROMPT, max_new_tokens=NUM_NEW)
        one_line(caught)
        assert engine.generate(PROMPT, max_new_tokens=NUM_NEW).token_ids == expected


def replace(path: Path) -> None:
    copy = path.with_suffix(".new")
    shutil.copy(path, copy)
    copy.replace(path)


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-64, os.SEEK_END)
        file.write(bytes(64))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("change", [replace, overwrite, cut, Path.unlink])
@pytest.mark.parametrize("io", ["auto", "buffered"])
def test_a_file_that_changes_stops_the_run(folder: Path, change: Callable[[Path], None], io: str) -> None:
    with leaves_nothing(), open_tiny(folder, expert_slots=2, io=io) as engine:
        stream = engine.stream(PROMPT, max_new_tokens=50, ignore_eos=True)
        next(stream)
        change(folder / "model.safetensors")
        with pytest.raises(CheckpointError, match=r"model\.safetensors (was replaced|ended)") as caught:
            next(stream)
        one_line(caught)
        assert isinstance(caught.value, (CheckpointChangedError, DiskReadError))
        with pytest.raises(CheckpointError):
            engine.generate(PROMPT, max_new_tokens=2)
        assert_at_rest(engine)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_engine_that_is_dropped_goes_away(source: Path) -> None:
    with leaves_nothing():
        engine = open_tiny(source)
        engine.generate(PROMPT, max_new_tokens=2)
        threads = engine_threads()
        assert threads and open_checkpoint_files()
        del engine
        gc.collect()
        for thread in threads:
            thread.join(PATIENCE_S)


@pytest.fixture(autouse=True)
def _no_trace() -> Iterator[None]:
    previous = sys.gettrace()
    yield
    assert sys.gettrace() is previous
