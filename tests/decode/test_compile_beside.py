"""A compilation in the background beside threads that go on: torch's compiler changes the process while it traces."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from compiling import in_background
from engines import PROMPT, open_tiny, save_tiny
from patience import PATIENCE_S
from torch.fx.experimental.proxy_tensor import make_fx

import offmoe
from offmoe.decode.compile_thread import MAY_RAISE

NUM_NEW = 32


class Tracing:
    """A lowering that stands still inside torch's tracer until it may go on, and runs the graph as captured."""

    def __init__(self) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        def stand(x: torch.Tensor) -> torch.Tensor:
            self.begun.set()
            while not self.go_on.wait(0.01):  # an interruption is raised between two lines
                pass
            return x + 1

        make_fx(stand)(torch.zeros(1))
        return graph.forward


@pytest.fixture
def tracing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Tracing]:
    held = Tracing()
    in_background(monkeypatch, held)
    yield held
    held.go_on.set()


@pytest.fixture(scope="module")
def tiny_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("beside"))


def ids_of(engine: offmoe.Engine) -> tuple[int, ...]:
    return engine.generate(PROMPT, max_new_tokens=NUM_NEW, temperature=0, ignore_eos=True).token_ids


def end_of(engine: offmoe.Engine) -> None:
    """Wait for the compilation."""
    thread = engine._decode._thread if engine._decode is not None else None
    if thread is not None:
        thread.join(PATIENCE_S)


def test_steps_go_on_through_the_tracers_stand_ins_and_change_nothing(tiny_moe: Path, tracing: Tracing) -> None:
    """torch.fx replaces the call of every module of the process while it traces. In another thread its stand-in calls
    the module as ever, and looks through the globals of the module's file, for functions of which there are none:
    it would break off where those grow meanwhile, and torch writes its own names into globals that no module has.
    """
    methods = ("__call__", "__getattr__")
    originals = [getattr(torch.nn.Module, name) for name in methods]
    with open_tiny(tiny_moe) as engine:
        expected = ids_of(engine)
    with open_tiny(tiny_moe, compile="on") as engine:
        files = [type(module).forward.__globals__ for module in engine.model.modules()]
        before = [dict(names) for names in files]
        ids_of(engine)
        assert tracing.begun.wait(PATIENCE_S), engine.stats()["compile"]
        assert torch.nn.Module.__call__ is not originals[0]
        assert ids_of(engine) == expected
        assert engine.stats()["compile"] == "compiling"
        tracing.go_on.set()
        end_of(engine)
        assert engine.stats()["compile"].startswith("on")
        assert [getattr(torch.nn.Module, name) for name in methods] == originals
        assert files == before
        assert ids_of(engine) == expected


@pytest.mark.skipif(not MAY_RAISE, reason="torch before 2.13 is not interrupted")
def test_an_engine_that_is_closed_within_the_tracer_leaves_no_stand_in(tiny_moe: Path, tracing: Tracing) -> None:
    original = torch.nn.Module.__call__
    engine = open_tiny(tiny_moe, compile="on")
    ids_of(engine)
    assert tracing.begun.wait(PATIENCE_S)
    engine.close()
    assert torch.nn.Module.__call__ is original
    assert not torch.compiler.is_compiling()


def test_what_other_threads_set_and_drew_meanwhile_stays(tiny_moe: Path, tracing: Tracing) -> None:
    """A compilation that begins while another model is made, whose type is the default then: torch put that back at
    its end, minutes after the model was made, and had random numbers drawn again.
    """
    with open_tiny(tiny_moe, compile="on") as engine:
        try:
            torch.set_default_dtype(torch.bfloat16)
            ids_of(engine)
            assert tracing.begun.wait(PATIENCE_S)
            torch.set_default_dtype(torch.float32)
            torch.manual_seed(5)
            torch.rand(3)
            tracing.go_on.set()
            end_of(engine)
            assert engine.stats()["compile"].startswith("on")
            assert torch.get_default_dtype() == torch.float32
            drawn = torch.rand(1)
        finally:
            torch.set_default_dtype(torch.float32)
    torch.manual_seed(5)
    assert drawn == torch.rand(4)[3]
