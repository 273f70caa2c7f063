"""Resident modules that the CPU kernels compute: which are taken, which are left, and that nothing changes by it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines import PROMPT, open_tiny, plain_model, save_tiny
from torch import nn

from offmoe.kernels.cpu.kernels import CpuKernels
from offmoe.kernels.cpu.loader import load_cpu_kernels, usable_levels
from offmoe.models.native import NativeModules, find_norm
from offmoe.models.native_attention import _is_plain

NUM_NEW = 12

pytestmark = pytest.mark.skipif(not usable_levels(), reason="the CPU kernels were not built")


@pytest.fixture(scope="module")
def kernels() -> CpuKernels:
    found, _ = load_cpu_kernels()
    assert found is not None
    return found


def greedy(model: Any) -> list[int]:
    with torch.inference_mode():
        ids = model.generate(torch.tensor([PROMPT]), max_new_tokens=NUM_NEW, do_sample=False, eos_token_id=None)
    return ids[0, len(PROMPT) :].tolist()


# name -> attention modules that are still swapped after some tokens, of three.
FAMILIES = {
    "qwen3_moe": 3,
    "gpt_oss": 3,  # sinks, windows, half as many angles
    "glm4_moe": 3,  # turns a part of each head
    "exaone_moe": 1,  # some layers turn nothing
    "cohere2_moe": 0,  # neighbours turn with each other
    "deepseek_v3": 3,  # attends to latents
}


@pytest.mark.parametrize("name", FAMILIES)
def test_ids_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """Long enough that windows have moved."""
    folder = save_tiny(tmp_path, name)
    with open_tiny(folder, compile="off") as engine:
        native = engine._parts.native
        assert native is not None
        assert native.counts["linears"] > 0
        assert native.counts["routers"] > 0
        reply = engine.generate(PROMPT, max_new_tokens=NUM_NEW, temperature=0, ignore_end=True)
        assert native.counts["attentions"] == FAMILIES[name]
        assert list(reply.token_ids) == greedy(plain_model(folder))
        # transformers' own loop brings a cache of another kind: the modules' own code.
        assert list(reply.token_ids) == greedy(engine.model)


def test_the_first_reply_comes_again(tmp_path: Path) -> None:
    """The tokens on which modules are compared are computed as all others are, to the bit."""
    logits: list[list[torch.Tensor]] = [[], []]
    with open_tiny(save_tiny(tmp_path), compile="off") as engine:
        for seen in logits:
            engine.generate(PROMPT, max_new_tokens=NUM_NEW, choose=collect(seen), ignore_end=True)
    assert len(logits[0]) == NUM_NEW
    assert all(torch.equal(*pair) for pair in zip(*logits, strict=True))


def collect(logits: list[torch.Tensor]) -> Any:
    def choose(_: torch.Tensor, last: torch.Tensor) -> int:
        logits.append(last.clone())
        return int(last.argmax())

    return choose


def test_removing_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    with open_tiny(save_tiny(tmp_path), compile="off") as engine:
        native, model = engine._parts.native, engine.model
        assert native is not None
        swapped = [module for module in model.modules() if "forward" in module.__dict__]
        assert len(swapped) == native.counts.total() > 0
        native.remove()
        assert not any("forward" in module.__dict__ for module in model.modules())


def test_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFMOE_CPU_KERNELS", "off")
    with open_tiny(save_tiny(tmp_path), compile="off") as engine:
        assert engine._parts.native is None
        assert not any("forward" in module.__dict__ for module in engine.model.modules())


class Rms(nn.Module):
    def __init__(self, width: int, *, offset: float = 0.0, centred: bool = False, has_bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, generator=torch.Generator().manual_seed(1)))
        if has_bias:
            self.bias = nn.Parameter(torch.zeros(width))
        self.eps, self.offset, self.centred = 1e-6, offset, centred

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        wide = wide - wide.mean(-1, keepdim=True) if self.centred else wide
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * (self.offset + self.weight.float())).to(x.dtype)


class Gated(Rms):
    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(x if gate is None else x * gate)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_norms_are_known_by_their_numbers(kernels: CpuKernels, dtype: torch.dtype) -> None:
    plain, shifted = Rms(2048).to(dtype), Rms(2048, offset=1.0).to(dtype)
    found = find_norm(kernels, plain)
    assert found is not None
    assert found.kind != "one_plus_weight"
    found = find_norm(kernels, shifted)
    assert found is not None
    assert found.kind == "one_plus_weight"
    others = (Rms(2048, offset=0.5), Rms(2048, centred=True), Rms(2048, has_bias=True), Gated(2048), nn.Linear(4, 4))
    for other in others:
        assert find_norm(kernels, other.to(dtype)) is None


def test_a_linear_for_many_rows_or_with_gradients_is_torchs_own(kernels: CpuKernels) -> None:
    linear = nn.Linear(64, 48)
    native = NativeModules(kernels)
    native.swap_simple(linear)
    assert native.counts["linears"] == 1
    x = torch.randn(40, 64)
    with torch.inference_mode():
        assert torch.equal(linear(x), nn.functional.linear(x, linear.weight, linear.bias))
        torch.testing.assert_close(linear(x[:3]), nn.functional.linear(x[:3], linear.weight, linear.bias))
    linear(x[:3]).sum().backward()
    assert linear.weight.grad is not None


def test_code_that_does_more_than_attend_is_left_alone() -> None:
    class Plain(nn.Module):
        def forward(self, hidden_states: Any, position_embeddings: Any, past: Any) -> Any:
            cos, sin = position_embeddings
            query, key = apply_rotary_pos_emb(self.q_proj(hidden_states), self.k_proj(hidden_states), cos, sin)
            return self.o_proj(past.update(query, key))

    class Scaled(Plain):
        def forward(self, hidden_states: Any, position_embeddings: Any, past: Any) -> Any:
            cos, sin = position_embeddings
            query, key = apply_rotary_pos_emb(self.q_proj(hidden_states), self.k_proj(hidden_states), cos, sin)
            return self.o_proj(past.update(query * 2, key))

    class Gated(Plain):
        def forward(self, hidden_states: Any, position_embeddings: Any, past: Any) -> Any:
            cos, sin = position_embeddings
            query, key = apply_rotary_pos_emb(self.q_proj(hidden_states), self.k_proj(hidden_states), cos, sin)
            return self.o_proj(self.gate(past.update(query, key)))

    class Clipped(Plain):
        def forward(self, hidden_states: Any, position_embeddings: Any, past: Any) -> Any:
            cos, sin = position_embeddings
            query, key = self.q_proj(hidden_states), self.k_proj(hidden_states)
            if self.config.most is not None:
                query.clamp_(max=self.config.most)
            query, key = apply_rotary_pos_emb(query, key, cos, sin)
            return self.o_proj(past.update(query, key))

    assert _is_plain(Plain)
    assert not _is_plain(Scaled)
    assert not _is_plain(Gated)
    assert _is_plain(Clipped, SimpleNamespace(most=None))
    assert not _is_plain(Clipped, SimpleNamespace(most=4.0))
    assert not _is_plain(Clipped, SimpleNamespace())


def apply_rotary_pos_emb(query: Any, key: Any, cos: Any, sin: Any) -> tuple[Any, Any]:
    raise NotImplementedError
