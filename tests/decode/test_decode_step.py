"""The fused step: when it stays away and says why, who is told in passing, and that the books stay right."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cpu_cases import needs_library
from engines import PROMPT, assert_at_rest, open_tiny, save_tiny
from test_decode_families import logits
from torch import nn

import offmoe
from offmoe.hf.seam import ObserverHook

pytestmark = needs_library


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[offmoe.Engine]:
    """All experts in RAM, and the first tokens compared."""
    with open_tiny(save_tiny(tmp_path), expert_slots=16, compile="off") as opened:
        logits(opened)
        yield opened


def path(engine: offmoe.Engine) -> tuple[str, str]:
    stats = engine.stats()
    return stats["decode_path"], stats["decode_path_reason"]


@pytest.mark.parametrize(
    "name", ["", "model", "lm_head", "model.layers.2", "model.layers.1.self_attn.q_proj", "model.layers.2.mlp.experts"]
)
@pytest.mark.parametrize("before", [False, True])
def test_hooks_are_run(engine: offmoe.Engine, name: str, before: bool) -> None:
    wanted, seen = logits(engine), []
    module = engine.model.get_submodule(name)
    handle = (module.register_forward_pre_hook if before else module.register_forward_hook)(lambda *_: seen.append(1))
    try:
        hooked = logits(engine, reuse=False)
        assert len(seen) == len(hooked)
        assert path(engine) == ("eager", f"hooks on {name or 'the model'}")
    finally:
        handle.remove()
    assert (hooked - wanted).abs().max() < 2e-5 * wanted.abs().max()
    assert torch.equal(logits(engine, reuse=False), wanted)
    assert path(engine) == ("fused", "")


def test_hooks_of_every_module_are_run(engine: offmoe.Engine) -> None:
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        logits(engine, 4, reuse=False)
        assert path(engine) == ("eager", "hooks on all modules")
    finally:
        handle.remove()
    assert seen.count("Qwen3MoeAttention") == 3 * 4


@pytest.mark.parametrize("name", ["model.layers.2", "model.layers.2.post_attention_layernorm", "model.layers.2.mlp"])
def test_observers_are_told_in_passing(engine: offmoe.Engine, name: str) -> None:
    seen: list[torch.Tensor] = []

    class Hook(ObserverHook):
        def tell(self, state: torch.Tensor) -> None:
            seen.append(state.reshape(-1).clone())

        def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if args[0].numel() == args[0].shape[-1]:
                self.tell(args[0])

    engine.model.get_submodule(name).register_forward_pre_hook(Hook(), with_kwargs=True)
    logits(engine, reuse=False)
    assert path(engine) == ("fused", "")
    passing = seen.copy()
    seen.clear()
    with engine._decode.only_eager("a test"):
        logits(engine, reuse=False)
        assert path(engine) == ("eager", "a test")
    assert len(passing) == len(seen) == 11
    for one, other in zip(passing, seen, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_replaced_module_is_used(engine: offmoe.Engine) -> None:
    """Adapters wrap linears, also after the engine has generated."""

    class Doubled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * self.inner(x)

    wanted, attention = logits(engine), engine.model.get_submodule("model.layers.1.self_attn")
    original = attention.o_proj
    attention.o_proj = Doubled(original)
    doubled = logits(engine, reuse=False)
    assert path(engine) == ("eager", "self_attn.o_proj is a Doubled that the kernels do not read")
    with open_tiny(engine.folder, expert_slots=16, compile="off") as other:
        with torch.no_grad():
            other.model.get_submodule("model.layers.1.self_attn.o_proj").weight.mul_(2)
        expected = logits(other)
    assert (doubled - expected).abs().max() < 2e-5 * expected.abs().max()
    assert not torch.allclose(doubled, wanted)
    attention.o_proj = original
    assert torch.equal(logits(engine, reuse=False), wanted)
    assert path(engine) == ("fused", "")


def test_weights_that_moved_are_read_where_they_are(engine: offmoe.Engine) -> None:
    """`.data` puts other memory under a parameter; the old is given back."""
    with open_tiny(engine.folder, expert_slots=16, compile="off") as other:
        with torch.no_grad():
            other.model.get_submodule("model.norm").weight.mul_(2)
        expected = logits(other)
    norm = engine.model.get_submodule("model.norm")
    norm.weight.data = 2 * norm.weight.data
    assert torch.equal(logits(engine, reuse=False)[2:], expected[2:])
    assert path(engine) == ("fused", "")


def test_a_replaced_forward_is_used(engine: offmoe.Engine) -> None:
    wanted, norm, seen = logits(engine), engine.model.get_submodule("model.norm"), []
    own = norm.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        seen.append(1)
        return own(x)

    norm.forward = forward
    found = logits(engine, reuse=False)
    assert len(seen) == len(found)
    assert path(engine) == ("eager", "the forward of model.norm was replaced")
    assert (found - wanted).abs().max() < 2e-5 * wanted.abs().max()


@pytest.mark.parametrize(("prefetch", "experts"), [("off", 9), (1, 9), ("auto", 12), (2, 5)])
def test_missing_experts_and_lookahead_change_no_logit(prefetch: Any, experts: int, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)
    with open_tiny(folder, expert_slots=24, compile="off", prefetch="off") as engine:
        wanted = logits(engine, 30)
    with open_tiny(folder, expert_slots=experts, compile="off", prefetch=prefetch) as engine:
        found = logits(engine, 30)
        assert path(engine) == ("fused", "")
        assert engine.stats()["misses"] > 0
        assert_at_rest(engine)
    assert (found - wanted).abs().max() < 2e-5 * wanted.abs().max()


def test_the_books_are_those_of_the_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer calls, hits and misses, and what the routers chose: each token counts once, the compared ones too."""
    folder = save_tiny(tmp_path)
    found = []
    for way in ("fused", "eager"):
        monkeypatch.setenv("OFFMOE_DECODE", way)
        with open_tiny(folder, expert_slots=9, compile="off", prefetch="off") as engine:
            engine.generate(PROMPT, max_new_tokens=20, temperature=0, ignore_eos=True)
            stats = engine.stats()
            assert stats["decode_path"] == way
            events = [(event.layer_idx, tuple(event.ids)) for event in engine.recent_routing()]
            found.append((events, stats["layer_calls"], stats["hits"] + stats["late_hits"], stats["misses"]))
    (events, *fused), (wanted, *eager) = found
    assert events == wanted
    # Of a compared token, only layers that lack an expert count twice.
    assert all(0 <= one - other <= 2 * 2 * 3 for one, other in zip(fused, eager, strict=True))


def test_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFMOE_CPU_KERNELS", "off")
    with open_tiny(save_tiny(tmp_path), compile="off") as engine:
        logits(engine)
        assert path(engine) == ("eager", "no CPU kernels")


def test_who_entered_and_was_broken_off_holds_nobody_up(engine: offmoe.Engine) -> None:
    """Ctrl-C between entering and the call leaves such a state."""
    import threading

    calls = engine._parts.calls
    calls.enter()
    found: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: found.append(logits(engine, 4, reuse=False)))
    thread.start()
    thread.join()
    assert len(found[0]) == 4
    assert torch.equal(logits(engine, 4, reuse=False), found[0])


def test_a_second_thread_is_refused(engine: offmoe.Engine) -> None:
    """The fused step passes the model's forward by, and still holds the model while it computes."""
    step, calls = engine._decode._step, []
    assert step is not None
    run = step._program.__class__.__call__

    def busy(program: Any, begin: int, end: int | None = None) -> int:
        import threading

        def ask() -> None:
            try:
                engine.model(input_ids=torch.tensor([[1]]))
            except offmoe.OffmoeError as error:
                calls.append(type(error).__name__)

        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
        return run(program, begin, end)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(step._program), "__call__", busy)
        logits(engine, 3, reuse=False)
    assert calls == ["EngineBusyError"] * 2
