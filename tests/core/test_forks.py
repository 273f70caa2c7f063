"""Forked children of a process with an engine: refused at once, or working; never waiting."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from engines import PROMPT, open_tiny, save_tiny

import offmoe

if not hasattr(os, "fork"):
    pytest.skip("no forks here", allow_module_level=True)

LIMIT_S = 120


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("forks"))


@pytest.fixture
def engine(folder: Path) -> Iterator[offmoe.Engine]:
    with open_tiny(folder) as engine:
        engine.generate(PROMPT, max_new_tokens=2, temperature=0)
        yield engine


def in_child(call: Callable[[], object], *, leave: bool = False) -> str:
    """What `call` returns or raises in a forked child. `leave`: it ends as a program does, with its exit functions."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            signal.alarm(LIMIT_S)  # ends a child that waits
            try:
                text = f"{call()}"
            except offmoe.OffmoeError as error:
                text = f"{type(error).__name__}: {error}"
            os.write(write, text.encode())
            if leave:
                sys.exit(0)
        finally:
            if leave:
                import atexit

                atexit._run_exitfuncs()
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        text = answer.read()
    assert os.waitpid(pid, 0)[1] == 0, text
    return text


@pytest.mark.parametrize(
    "call",
    [
        lambda engine: engine.generate(PROMPT, max_new_tokens=2),
        lambda engine: engine.model(torch.tensor([[11, 17, 19, 120]])),
        lambda engine: engine.model.generate(torch.tensor([PROMPT]), max_new_tokens=2),
        lambda engine: engine.stats(),
    ],
)
def test_an_engine_is_refused_in_a_child(engine: offmoe.Engine, call: Callable[[offmoe.Engine], object]) -> None:
    told = in_child(lambda: call(engine))
    assert told.startswith(f"EngineBusyError: the engine was loaded in process {os.getpid()}, and this is a forked")
    assert told.endswith("load the model here, or start the process by spawn")


def test_a_child_may_close_and_leave_and_the_parent_goes_on(engine: offmoe.Engine) -> None:
    expected = engine.generate(PROMPT, max_new_tokens=4, temperature=0).token_ids
    assert in_child(engine.close, leave=True) == "None"
    assert in_child(lambda: None, leave=True) == "None"
    assert engine.generate(PROMPT, max_new_tokens=4, temperature=0).token_ids == expected


def test_a_child_loads_for_itself_after_torch_used_its_threads(folder: Path, engine: offmoe.Engine) -> None:
    def load_and_generate() -> tuple[int, ...]:
        with open_tiny(folder) as own:
            return tuple(own.generate(PROMPT, max_new_tokens=4, temperature=0).token_ids)

    expected = tuple(engine.generate(PROMPT, max_new_tokens=4, temperature=0).token_ids)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        wide = torch.ones(512, 512)
        _ = wide @ wide + wide  # starts the threads that a child waits for
        assert in_child(lambda: (torch.get_num_threads(), float((wide @ wide).sum()))) == f"(1, {512.0**3})"
        assert in_child(load_and_generate) == str(expected)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
