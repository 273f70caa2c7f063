"""More shards than open files, and drives that refuse, come short or fail once."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import TIMEOUT_S, environment
from engines import PROMPT, open_tiny, save_tiny
from safetensors.torch import load_file, save_file

from offmoe.checkpoint.handles import Handles
from offmoe.checkpoint.shard_file import ShardFile
from offmoe.core.errors import DiskReadError

DATA = bytes(range(256)) * 40  # two whole blocks and a half
FEW_FILES = """
import json, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
import offmoe
with offmoe.load(sys.argv[1], ram="4GiB", experts=4) as engine:
    reply = engine.generate(json.loads(sys.argv[2]), max_new_tokens=5, temperature=0)
    print(json.dumps([len(engine._parts.index.files), *reply.token_ids]))
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "shard").write_bytes(DATA)
    return tmp_path / "shard"


def aligned(num_bytes: int) -> memoryview:
    import mmap

    return memoryview(mmap.mmap(-1, num_bytes))


def open_numbers() -> int:
    return len(list(Path("/proc/self/fd").iterdir())) if sys.platform == "linux" else 0


def test_a_model_of_more_shards_than_open_files(tmp_path: Path) -> None:
    """A shard a tensor, 128 of them; the process may have 64 files."""
    whole, parts = save_tiny(tmp_path / "whole"), tmp_path / "parts"
    parts.mkdir()
    tensors = load_file(whole / "model.safetensors")
    names = {key: f"model-{idx:05d}-of-{len(tensors):05d}.safetensors" for idx, key in enumerate(tensors, 1)}
    for key, tensor in tensors.items():
        save_file({key: tensor}, parts / names[key])
    (parts / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    for name in ("config.json", "generation_config.json"):
        (parts / name).write_bytes((whole / name).read_bytes())
    with open_tiny(whole) as engine:
        expected = engine.generate(PROMPT, max_new_tokens=5, temperature=0).token_ids
    done = subprocess.run(
        [sys.executable, "-c", FEW_FILES, str(parts), json.dumps(PROMPT)], capture_output=True, text=True,
        timeout=TIMEOUT_S, env=environment(), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [len(tensors), *expected] and len(tensors) > 64


def test_the_longest_unused_is_closed_and_one_that_is_borrowed_is_not(path: Path) -> None:
    opened: list[str] = []

    def opener(name: str) -> Callable[[], int]:
        def open_it() -> int:
            opened.append(name)
            return os.open(path, os.O_RDONLY)

        return open_it

    handles, before = Handles(2), open_numbers()
    with handles.borrow("a", opener("a")) as held:
        for name in "bcbdb":
            with handles.borrow(name, opener(name)) as number:
                assert os.pread(number, 3, 0) == DATA[:3]
        assert "".join(opened) == "abcbdb"  # "a" is held: there is room for one more
        handles.forget("a")
        assert os.pread(held, 3, 0) == DATA[:3]
    with handles.borrow("a", opener("a")):
        assert repr(handles) == "<Handles [2 open, 2 at most]>"
    for name in "abcd":
        handles.forget(name)
    assert open_numbers() == before


def test_the_process_may_have_fewer_files_than_were_counted_on(path: Path) -> None:
    failures = [OSError(errno.EMFILE, "Too many open files")]

    def open_it() -> int:
        if failures:
            raise failures.pop()
        return os.open(path, os.O_RDONLY)

    handles = Handles(9)
    for name in "ab":
        with handles.borrow(name, lambda: os.open(path, os.O_RDONLY)):
            pass
    with handles.borrow("c", open_it):
        assert repr(handles) == "<Handles [1 open, 9 at most]>"
    handles.forget("c")


def test_threads_read_through_two_handles(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handles = Handles(2)
    monkeypatch.setattr("offmoe.checkpoint.shard_file.shared_handles", lambda: handles)
    files = [ShardFile(path) for _ in range(6)]
    wrong: list[int] = []

    def read() -> None:
        for start in range(300):
            view = memoryview(bytearray(50))
            files[start % 6].read_into(view, start, need_bytes=50)
            if bytes(view) != DATA[start : start + 50]:
                wrong.append(start)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for file in files:
        file.close()
    assert not wrong and repr(handles) == "<Handles [0 open, 2 at most]>"


def test_a_file_system_that_opens_for_direct_reads_and_refuses_them(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(number: int, buffers: object, offset: int) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    file = ShardFile(path)
    monkeypatch.setattr(os, "preadv", refuse)
    assert not file.open_direct()
    file.close()


@pytest.mark.parametrize("failure", ["refused", "short", "nothing"])
def test_a_direct_read_that_fails_later_goes_on_through_the_page_cache(
    path: Path, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    whole, modes = ShardFile._read_once, []

    def read_once(file: ShardFile, view: memoryview, start: int, *, direct: bool) -> int:
        modes.append(direct)
        if direct and failure == "refused":
            raise OSError(errno.EINVAL, "Invalid argument")
        if direct:
            return whole(file, view[:1000], start, direct=False) if failure == "short" else 0
        return whole(file, view, start, direct=False)

    file = ShardFile(path)
    if not file.open_direct():
        pytest.skip("no direct reads here")
    monkeypatch.setattr(ShardFile, "_read_once", read_once)
    view = aligned(8192)
    file.read_into(view, 0, need_bytes=8192, direct=True)
    assert bytes(view) == DATA[:8192] and modes == [True, False]
    file.close()


@pytest.mark.parametrize(("failures", "code"), [(1, errno.EIO), (2, errno.EIO), (1, errno.EPERM)])
def test_a_drive_that_fails_once_is_asked_again(
    path: Path, monkeypatch: pytest.MonkeyPatch, failures: int, code: int
) -> None:
    whole, calls = ShardFile._read_once, []

    def read_once(file: ShardFile, view: memoryview, start: int, *, direct: bool) -> int:
        calls.append(start)
        if len(calls) <= failures:
            raise OSError(code, os.strerror(code))
        return whole(file, view, start, direct=direct)

    file, view = ShardFile(path), memoryview(bytearray(100))
    monkeypatch.setattr(ShardFile, "_read_once", read_once)
    if (failures, code) == (1, errno.EIO):
        file.read_into(view, 7, need_bytes=100)
        assert bytes(view) == DATA[7:107] and calls == [7, 7]
    else:
        with pytest.raises(DiskReadError, match=f"at byte 7 failed: {os.strerror(code)}"):
            file.read_into(view, 7, need_bytes=100)
        assert len(calls) == failures
    file.close()


def test_a_file_that_is_collected_while_another_opens_is_no_deadlock(tmp_path: Path) -> None:
    """Finalizers run between any two lines: here within the look-up, whose thread holds the lock."""
    path = tmp_path / "file"
    path.write_bytes(b"x")
    handles = Handles(4)
    with handles.borrow("old", lambda: os.open(path, os.O_RDONLY)) as old:
        pass

    def opener() -> int:
        handles.forget_unlocked("old")
        return os.open(path, os.O_RDONLY)

    with handles.borrow("new", opener):
        pass
    with pytest.raises(OSError):
        os.fstat(old)
    handles.forget("new")
    assert repr(handles) == "<Handles [0 open, 4 at most]>"
