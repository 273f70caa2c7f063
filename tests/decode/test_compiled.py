"""Compiled decode steps on the CPU: same ids as without, and no way to fail that a user would notice.

Most tests run the captured graph operator by operator: graph, inputs and side effects are those of a compiled step, and
it takes seconds where a C++ compiler takes half a minute.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from compiling import as_captured, in_background, lower_with
from engines import PROMPT, assert_at_rest, leaves_nothing, open_tiny, save_tiny
from families import build
from logs import logs_warning
from patience import PATIENCE_S
from transformers.models.qwen3_moe.modeling_qwen3_moe import repeat_kv

import offmoe
from offmoe.attention.grouped import attend_grouped, group_attention
from offmoe.core.errors import DiskReadError, EngineClosedError
from offmoe.decode import compile_thread, compiled
from offmoe.decode.compile_thread import CompileThread
from offmoe.decode.compiled import DecodeCompiler
from offmoe.decode.compiled_step import CompiledStep
from offmoe.hf.seam import define_experts_operators
from offmoe.kernels.slot_kernels import TorchSlotKernels
from offmoe.kv.cache import make_kv_cache
from offmoe.kv.static_cache import StaticKv
from offmoe.tiers.device import SimulatedDevice

NUM_NEW = 32
interruptible = pytest.mark.skipif(not compile_thread.MAY_RAISE, reason="torch before 2.13 is not interrupted")


def noted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The code of every graph that is compiled from now on; run as captured."""
    graphs: list[str] = []

    def note(graph: Any, inputs: Any) -> Any:
        graphs.append(graph.code)
        return as_captured(graph, inputs)

    lower_with(monkeypatch, note)
    return graphs


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    lower_with(monkeypatch, as_captured)


def ids_of(engine: offmoe.Engine, num_new: int = NUM_NEW) -> tuple[int, ...]:
    return engine.generate(PROMPT, max_new_tokens=num_new, temperature=0, ignore_eos=True).token_ids


@pytest.fixture(scope="module")
def tiny_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="module")
def expected(tiny_moe: Path) -> tuple[int, ...]:
    with open_tiny(tiny_moe) as engine:
        assert engine.stats()["compile"] == "off"
        return ids_of(engine)


def test_inductor_gives_the_same_ids(tiny_moe: Path, expected: tuple[int, ...]) -> None:
    with open_tiny(tiny_moe, compile="on") as engine:
        assert engine.stats()["compile"] == "waiting"
        assert ids_of(engine) == expected
        assert engine.stats()["compile"] == "on"
        assert_at_rest(engine)


# A sliding window that the reply leaves behind, latent attention, linear attention beside full attention.
@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3", "qwen3_next"])
def test_families_give_the_same_ids(name: str, tmp_path: Path, quick: None) -> None:
    save_tiny(tmp_path, name)
    with open_tiny(tmp_path) as engine:
        expected = ids_of(engine)
    with open_tiny(tmp_path, compile="on") as engine:
        assert ids_of(engine) == expected
        assert ids_of(engine) == expected, "a second generation begins with an empty cache"
        assert engine.stats()["compile"] == "on"


def test_compiled_steps_are_what_runs(tiny_moe: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    positions: list[int] = []
    call = CompiledStep.__call__

    def counted(step: CompiledStep, ids: torch.Tensor, position: int) -> torch.Tensor:
        positions.append(position)
        return call(step, ids, position)

    monkeypatch.setattr(CompiledStep, "__call__", counted)
    with open_tiny(tiny_moe, compile="on") as engine:
        ids_of(engine, 9)
    assert positions == list(range(len(PROMPT), len(PROMPT) + 8))


def test_auto_is_off_without_a_device(tiny_moe: Path) -> None:
    with open_tiny(tiny_moe, compile="auto") as engine:
        ids_of(engine, 2)
        assert engine.stats()["compile"] == "off"


def test_in_the_background(tiny_moe: Path, expected: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The first reply is the model's own while the compiler is held back; a later one is compiled."""
    monkeypatch.setattr(compiled, "TOKENS_BEFORE", 0)
    let_go = threading.Event()

    def held_back(graph: Any, inputs: Any) -> Any:
        assert let_go.wait(PATIENCE_S)
        return as_captured(graph, inputs)

    monkeypatch.setattr(
        compiled, "DecodeCompiler",
        lambda model, length, **options: DecodeCompiler(
            model, length, **{**options, "background": True, "lower": held_back}
        ),
    )  # fmt: skip
    with open_tiny(tiny_moe, compile="on") as engine:
        assert ids_of(engine) == expected
        assert engine.stats()["compile"] == "compiling"
        compiler = engine._decode
        assert compiler is not None
        thread = compiler._thread
        assert thread is not None
        let_go.set()
        thread.join(PATIENCE_S)
        assert engine.stats()["compile"] == "on"
        assert ids_of(engine) == expected
        assert compiler._checked


def test_one_step_serves_every_length(
    tiny_moe: Path, expected: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = noted(monkeypatch)
    with open_tiny(tiny_moe, compile="on") as engine:
        assert ids_of(engine, 4) == expected[:4]
        assert ids_of(engine) == expected
        step = engine._decode._step
        assert step.static.capacity == engine.context_length
        whole = engine.context_length - len(PROMPT)
        assert len(ids_of(engine, whole)) == whole
    assert len(graphs) == 1


def test_a_short_reply_is_not_worth_compiling(
    tiny_moe: Path, expected: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    in_background(monkeypatch)
    monkeypatch.setattr(compiled, "TOKENS_BEFORE", 40)
    with open_tiny(tiny_moe, compile="on") as engine:
        assert ids_of(engine) == expected  # 31 steps
        assert engine.stats()["compile"] == "waiting"
        assert ids_of(engine) == expected
        assert engine.stats()["compile"] != "waiting"


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13),
    reason="guards of torch 2.11 keep the numbers of closed engines: a process compiles anew for each engine",
)
def test_the_next_engine_has_the_same_graphs(tiny_moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that torch's cache of compiled code knows them."""
    graphs = noted(monkeypatch)
    for _ in range(2):
        gc.collect()  # engines of other tests, and then the first one
        with open_tiny(tiny_moe, compile="on") as engine:
            ids_of(engine, 4)
        del engine
    assert graphs[0] == graphs[1] and "offmoe.experts" in graphs[0]


def test_two_engines_have_numbers_of_their_own(tiny_moe: Path) -> None:
    with open_tiny(tiny_moe) as one, open_tiny(tiny_moe) as two:
        numbers = [
            module._offmoe_handle for engine in (one, two) for module in engine.model.modules()
            if hasattr(module, "_offmoe_handle")
        ]  # fmt: skip
    assert len(set(numbers)) == len(numbers)


def test_resident_experts_are_part_of_the_graph(
    tiny_moe: Path, expected: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing cuts the step on a device whose kernels look slots up, and every choice is still counted."""
    graphs = noted(monkeypatch)
    monkeypatch.setattr(TorchSlotKernels, "looks_up", lambda kernels, layer_idx: True)
    with open_tiny(tiny_moe, expert_slots="auto", compile="on", simulated=SimulatedDevice(1e12)) as engine:
        assert ids_of(engine) == expected
        (code,) = graphs
        assert "offmoe.resident_experts" in code and "offmoe.experts" not in code
        before = engine.stats()
        again = engine.stream(PROMPT, max_new_tokens=NUM_NEW, temperature=0, ignore_eos=True, reuse=False)
        assert tuple(id_ for piece in again for id_ in piece.token_ids) == expected
        after, num_layers = engine.stats(), len(engine._parts.experts.layers)
        num_choices = (len(PROMPT) + NUM_NEW - 1) * num_layers * engine.top_k
        assert after["hits"] - before["hits"] == num_choices
        assert after["layer_calls"] - before["layer_calls"] == NUM_NEW * num_layers
        with engine.uncached():  # served otherwise than when it was captured
            assert ids_of(engine) == expected
            assert engine.stats()["hits"] == after["hits"]
            assert engine.stats()["decode_path"] == "eager"


@pytest.mark.parametrize("kind", ["bool", "float", "none"])
def test_grouped_attention_is_attention(kind: str) -> None:
    """Four heads on two, keys wider than values; the cache itself is what the rewritten graph reads."""
    generator = torch.Generator().manual_seed(5)
    query, keys, values = (
        torch.randn(shape, generator=generator) for shape in [(1, 4, 1, 8), (1, 2, 9, 8), (1, 2, 9, 6)]
    )
    visible = torch.arange(9)[None, None, None] < 6
    mask = {"bool": visible, "float": torch.where(visible, 0.0, -torch.inf), "none": None}[kind]

    def attention(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        repeated = (repeat_kv(states, 2) for states in (keys, values))
        return torch.nn.functional.scaled_dot_product_attention(query, *repeated, attn_mask=mask, scale=0.3)

    def lower(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        assert group_attention(graph) == 1
        new = next(node for node in graph.graph.nodes if node.target is attend_grouped)
        assert [part.op for part in new.args[:3]] == ["placeholder"] * 3
        return graph.forward

    got = torch.compile(attention, backend=lower, fullgraph=True)(query, keys, values)
    torch.testing.assert_close(got, attention(query, keys, values))


def test_what_does_not_compile_is_not_used(
    tiny_moe: Path, expected: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_compiler(graph: Any, inputs: Any) -> Any:
        raise OSError("no C++ compiler\nhere")

    lower_with(monkeypatch, no_compiler)
    with open_tiny(tiny_moe, compile="on") as engine:
        with logs_warning("no C") as caught:
            assert ids_of(engine) == expected
        assert len(caught) == 1
        assert engine.stats()["compile"] == "failed: OSError: no C++ compiler here"
        assert ids_of(engine) == expected


def test_what_disagrees_is_not_used(tiny_moe: Path, expected: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(graph: Any, inputs: Any) -> Any:
        run = as_captured(graph, inputs)
        return lambda *args: tuple(1.01 * out + 0.1 for out in run(*args))

    lower_with(monkeypatch, wrong)
    with open_tiny(tiny_moe, compile="on") as engine:
        with logs_warning("differ"):
            assert ids_of(engine) == expected
        assert engine.stats()["compile"].startswith("failed: its logits differ by")


def test_a_graph_that_breaks_when_it_runs_is_not_used(
    tiny_moe: Path, expected: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            raise RuntimeError("device lost its way")

        return run

    lower_with(monkeypatch, broken)
    with open_tiny(tiny_moe, compile="on") as engine, logs_warning("lost its way"):
        assert ids_of(engine) == expected


# Sparse attention, whose indexer grows; a hyper-connected cache; a model that refuses a cache from outside.
@pytest.mark.parametrize("name", ["deepseek_v32", "minimax"])
def test_families_without_a_static_form_say_so(name: str, tmp_path: Path, quick: None) -> None:
    save_tiny(tmp_path, name)
    with open_tiny(tmp_path) as engine:
        expected = ids_of(engine, 6)
    with open_tiny(tmp_path, compile="on") as engine:
        with logs_warning("KV cache"):
            assert ids_of(engine, 6) == expected
        assert "KV cache" in engine.stats()["compile"]


def test_errors_of_the_experts_pass_through(
    tiny_moe: Path, expected: tuple[int, ...], quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_tiny(tiny_moe, compile="on") as engine:
        assert ids_of(engine) == expected
        disk, calls = engine._parts.disk, []

        def fail(*args: Any, **options: Any) -> Any:
            calls.append(args)
            raise DiskReadError("reading failed; check the drive")

        with monkeypatch.context() as patch:
            pieces = engine.stream(PROMPT, max_new_tokens=NUM_NEW, temperature=0, ignore_eos=True)
            next(pieces)
            patch.setattr(disk, "read", fail)
            with pytest.raises(DiskReadError):
                list(pieces)
        assert calls
        assert engine.stats()["compile"] == "on"
        assert ids_of(engine) == expected
        assert_at_rest(engine)


def test_a_closed_engine_says_so(tiny_moe: Path, quick: None) -> None:
    """In the middle of a compiled stream, and for a graph that still runs."""
    define_experts_operators()
    experts = torch.ops.offmoe.experts
    x_TD, ids_TK, weights_TK = torch.zeros(1, 48), torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2)
    with leaves_nothing():
        engine = open_tiny(tiny_moe, compile="on")
        model = engine.model
        handle = next(module._offmoe_handle for module in model.modules() if hasattr(module, "_offmoe_handle"))
        pieces = engine.stream(PROMPT, max_new_tokens=NUM_NEW, temperature=0, ignore_eos=True)
        for _ in range(4):
            next(pieces)
        assert experts(x_TD, ids_TK, weights_TK, handle).shape == (1, 48)
        engine.close()
        with pytest.raises(EngineClosedError, match="closed"):
            next(pieces)
        with pytest.raises(EngineClosedError, match="closed"):
            experts(x_TD, ids_TK, weights_TK, handle)


def test_a_handle_without_a_model_says_so() -> None:
    define_experts_operators()
    with pytest.raises(EngineClosedError, match="closed"):
        torch.ops.offmoe.experts(torch.zeros(1, 4), torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2), 10**9)


def test_nothing_keeps_the_model(tiny_moe: Path, quick: None) -> None:
    engine = open_tiny(tiny_moe, compile="on")
    ids_of(engine, 4)
    model = weakref.ref(engine.model)
    engine.close()
    del engine
    gc.collect()
    assert model() is None


def test_two_engines_do_not_meet(tmp_path: Path, tiny_moe: Path, expected: tuple[int, ...], quick: None) -> None:
    save_tiny(tmp_path, seed=3)
    with open_tiny(tmp_path) as other:
        other_expected = ids_of(other)
    with open_tiny(tiny_moe, compile="on") as one, open_tiny(tmp_path, compile="on") as two:
        pieces = one.stream(PROMPT, max_new_tokens=NUM_NEW, temperature=0, ignore_eos=True)
        first = [next(pieces).token_ids[0] for _ in range(5)]
        assert ids_of(two) == other_expected
        rest = [id_ for piece in pieces for id_ in piece.token_ids]
        assert (*first, *rest) == expected


def test_a_change_of_threads_compiles_nothing_again(
    tiny_moe: Path, expected: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    lowered: list[object] = []

    def counted(graph: Any, inputs: Any) -> Any:
        lowered.append(graph)
        return as_captured(graph, inputs)

    lower_with(monkeypatch, counted)
    with open_tiny(tiny_moe, compile="on") as engine:
        ids_of(engine, 4)
        torch.set_num_threads(2)
        try:
            assert ids_of(engine) == expected
        finally:
            torch.set_num_threads(1)
        found: list[tuple[int, ...]] = []
        thread = threading.Thread(target=lambda: found.append(ids_of(engine)))
        thread.start()
        thread.join()
        assert found == [expected]
    assert len(lowered) == 1


@pytest.fixture
def sliding() -> Iterator[tuple[Any, Any, StaticKv]]:
    """A model with a window of 8 whose buffers hold 16, and its cache after a prompt of 10."""
    model = build("gpt_oss")
    cache = make_kv_cache(model, 64)
    assert cache is not None
    with torch.inference_mode():
        model(input_ids=torch.arange(3, 13)[None], past_key_values=cache, use_cache=True)
        yield model, cache, StaticKv(cache, 64)


def test_static_and_eager_steps_share_one_memory(sliding: tuple[Any, Any, StaticKv]) -> None:
    """Either may take any step, also across the moment when the window moves to the buffer's beginning."""
    model, cache, static = sliding
    ids = torch.randint(3, 100, (1, 40), generator=torch.Generator().manual_seed(2))
    whole = model(input_ids=torch.cat([torch.arange(3, 13)[None], ids], dim=1)).logits[0]
    for idx in range(40):
        position = 10 + idx
        here = {"position_ids": torch.tensor([[position]]), "use_cache": True}
        if idx % 3:
            static.seek(position)
            logits = model(input_ids=ids[:, idx : idx + 1], past_key_values=static.cache, **here).logits[0, -1]
            static.hand_back(position + 1)
        else:
            logits = model(input_ids=ids[:, idx : idx + 1], past_key_values=cache, **here).logits[0, -1]
        assert float((logits - whole[position]).abs().max() / whole[position].abs().max()) < 1e-5
    pointers = {buffer.data_ptr() for layer in cache.layers for buffer in layer.buffers}
    assert {layer.keys.data_ptr() for layer in static.cache.layers} <= pointers


@interruptible
def test_closing_ends_a_compilation_and_keeps_nothing(tiny_moe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_background(monkeypatch)
    with leaves_nothing():
        engine = open_tiny(tiny_moe, compile="on")
        ids_of(engine, 3)
        assert engine.stats()["compile"] == "compiling"
        assert engine._decode is not None
        thread, model = engine._decode._thread, weakref.ref(engine.model)
        assert thread is not None
        while not thread._is_open:  # within Dynamo
            thread.join(0.01)
        # An interruption that is raised in a collector's callback (Hypothesis has one) is swallowed, and the next one
        # comes in half a second; but pytest keeps the first one's frames, and with them the model.
        callbacks = gc.callbacks.copy()
        gc.callbacks.clear()
        try:
            engine.close()
        finally:
            gc.callbacks.extend(callbacks)
        assert not thread.is_alive()
        del engine
        gc.collect()
        assert model() is None
    with open_tiny(tiny_moe, compile="on") as engine:  # the compiler of this process still works
        ids_of(engine, 3)
        thread = engine._decode._thread if engine._decode is not None else None
        if thread is not None:
            thread.join()
        assert engine.stats()["compile"].startswith("on")


def test_a_process_may_end_while_a_step_compiles(tiny_moe: Path) -> None:
    """Daemon threads within torch's C++ code abort a process that ends: 7 of 7 did."""
    code = f"""
import torch, offmoe
from offmoe.decode import compiled
original, compiled.TOKENS_BEFORE = compiled.DecodeCompiler, 0
compiled.DecodeCompiler = lambda *args, **options: original(*args, **{{**options, "background": True}})
engine = offmoe.load({str(tiny_moe)!r}, ram="4GiB", compile="on", tell=None)
engine.generate([5, 77, 31], max_new_tokens=3, ignore_eos=True)
thread = engine._decode._thread
while not thread._is_open:
    thread.join(0.01)
thread.join(0.5)
print(thread.is_alive())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", ""), done


@interruptible
@pytest.mark.parametrize("asked", ["never", "inside", "at the end"])
def test_the_interpreter_looks_for_no_interruption_any_more(asked: str) -> None:
    """Python 3.11 ends no call under `sys.settrace` while it does: this would not end."""
    code = f"""
import sys, threading
from offmoe.decode.compile_thread import CompileThread, _raise_in, Interrupted, interruptible
begun, go_on, ended = threading.Event(), threading.Event(), []
def work():
    with interruptible():
        begun.set()
        go_on.wait()
        if {asked!r} == "at the end":
            thread._was_asked = True
            _raise_in(thread, Interrupted)
        elif {asked!r} == "inside":
            while True:
                pass
    ended.append(True)
thread = CompileThread(work)
thread.start()
begun.wait()
go_on.set()
print(thread.interrupt() if {asked!r} == "inside" else thread.join())
lines = []
def trace(frame, event, argument):
    lines.append(event)
    return trace
def called():
    return len("abc")
sys.settrace(trace)
called()
sys.settrace(None)
print(lines)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=PATIENCE_S
    )  # fmt: skip
    expected = f"{'True' if asked == 'inside' else 'None'}\n['call', 'line', 'return']\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, expected, ""), done


def test_compiled_steps_wait_where_torch_cannot_run_them_beside_a_compilation(
    tiny_moe: Path, expected: tuple[int, ...], quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch 2.11 refuses compiled code in every thread while one traces; the model's own steps go on meanwhile."""
    with open_tiny(tiny_moe, compile="on") as engine:
        assert ids_of(engine) == expected
        monkeypatch.setattr(compiled, "_RUNS_WHILE_COMPILING", False)
        let_go, calls = threading.Event(), []
        call = CompiledStep.__call__
        monkeypatch.setattr(CompiledStep, "__call__", lambda *args: calls.append(1) or call(*args))
        other = CompileThread(let_go.wait)
        other.start()
        try:
            assert ids_of(engine) == expected
            assert not calls
        finally:
            let_go.set()
            other.join()
        assert ids_of(engine) == expected
        assert calls


def test_where_torch_lets_no_exception_through_a_compilation_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.11 aborted the process."""
    monkeypatch.setattr(compile_thread, "MAY_RAISE", False)
    let_go, ended = threading.Event(), []

    def work() -> None:
        with compile_thread.interruptible():
            while not let_go.wait(0.01):
                pass
            ended.append(True)

    thread = CompileThread(work)
    thread.start()
    assert not thread.interrupt(patience_s=0.1)
    let_go.set()
    assert thread.interrupt() and ended == [True]
