"""Resident modules that the CPU kernels compute: which are taken, which are left, and that nothing changes by it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import PROMPT, open_tiny, plain_model, save_tiny
from families import build, save_layout
from torch import nn
from transformers import AutoModelForCausalLM

from offmoe.hf.replace import ReplacedModule, ReplacedModules, find_norm
from offmoe.kernels.cpu.kernels import CpuKernels
from offmoe.kernels.cpu.loader import load_cpu_kernels, usable_levels

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


@pytest.mark.parametrize("name", ["qwen3_moe", "cohere2_moe", "lfm2_moe"])
def test_ids_are_those_of_transformers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long enough that windows have moved; in the modules' own code and in transformers' own loop."""
    monkeypatch.setenv("OFFMOE_DECODE", "eager")
    folder = save_tiny(tmp_path, name)
    with open_tiny(folder, compile="off") as engine:
        native = engine._parts.native
        assert native is not None
        assert native.counts["linears"] > 0
        reply = engine.generate(PROMPT, max_new_tokens=NUM_NEW, temperature=0, ignore_eos=True)
        assert engine.stats()["decode_path_reason"] == "OFFMOE_DECODE=eager"
        assert list(reply.token_ids) == greedy(plain_model(folder))
        # transformers' own loop brings a cache of another kind.
        assert list(reply.token_ids) == greedy(engine.model)


def test_removing_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    with open_tiny(save_tiny(tmp_path), compile="off") as engine:
        native, model = engine._parts.native, engine.model
        assert native is not None
        ours = [module for module in model.modules() if isinstance(module, ReplacedModule)]
        assert len(ours) == native.counts.total() > 0
        kinds, names = [type(module) for module in plain_model(engine.folder).modules()], list(model.state_dict())
        native.remove()
        assert not any(isinstance(module, ReplacedModule) for module in model.modules())
        assert [type(module) for module in model.modules()] == kinds
        assert list(model.state_dict()) == names


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
    found = find_norm(kernels, Rms(2048, centred=True).to(dtype))
    assert found is not None
    assert found.kind == "centred"
    others = (Rms(2048, offset=0.5), Rms(2048, has_bias=True), Gated(2048), nn.Linear(4, 4))
    for other in others:
        assert find_norm(kernels, other.to(dtype)) is None


def test_a_linear_for_many_rows_or_with_gradients_is_torchs_own(kernels: CpuKernels) -> None:
    model = nn.Sequential(nn.Linear(64, 48))
    native = ReplacedModules(kernels)
    native.replace(model)
    assert native.counts["linears"] == 1
    linear = model[0]
    x = torch.randn(40, 64)
    with torch.inference_mode():
        assert torch.equal(linear(x), nn.functional.linear(x, linear.weight, linear.bias))
        torch.testing.assert_close(linear(x[:3]), nn.functional.linear(x[:3], linear.weight, linear.bias))
    linear(x[:3]).sum().backward()
    assert linear.weight.grad is not None


def test_a_replaced_module_is_one_of_its_kind_with_the_same_parts_and_copies_are_plain(kernels: CpuKernels) -> None:
    model = nn.Sequential(nn.Linear(64, 64), Rms(64))
    model.append(model[0])  # a module in two places
    originals, seen = list(model), []
    handle = originals[0].register_forward_pre_hook(lambda module, args: seen.append(type(module)))
    ReplacedModules(kernels).replace(model)
    assert model[0] is model[2] and isinstance(model[0], ReplacedModule)
    assert isinstance(model[0], nn.Linear) and isinstance(model[1], Rms)
    assert all(a is b for a, b in zip(model.parameters(), nn.Sequential(*originals).parameters(), strict=True))
    x = torch.randn(2, 64)
    with torch.inference_mode():
        ours = model(x)
        assert seen == [type(model[0])] * 2  # hooks went along, and can be taken away
        handle.remove()
        torch.testing.assert_close(ours, nn.Sequential(*originals)(x))
        copied = copy.deepcopy(model)
        assert [type(module) for module in copied] == [nn.Linear, Rms, nn.Linear]
        copied[0].weight.zero_()
        torch.testing.assert_close(model(x), ours)
        assert not copied(x).isfinite().all() or not torch.equal(copied(x), ours)


def test_other_weights_are_seen(kernels: CpuKernels) -> None:
    model = nn.Sequential(nn.Linear(64, 48, bias=False))
    ReplacedModules(kernels).replace(model)
    x = torch.randn(2, 64)
    with torch.inference_mode():
        for in_place in (False, True):
            other = nn.Parameter(torch.randn(48, 64), requires_grad=False)
            if in_place:
                model[0].weight.data = other
            else:
                model[0].weight = other
            torch.testing.assert_close(model(x), nn.functional.linear(x, other))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_depthwise_convolutions_in_16_bits_are_computed_in_float32(
    kernels: CpuKernels, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rounding of torch, called as a module or through its weight, as transformers' mixers do it."""
    monkeypatch.setattr("offmoe.hf.replace.float32_is_faster", lambda asked: asked == dtype)
    model = nn.Sequential(
        nn.Conv1d(24, 24, 4, groups=24, padding=3), nn.Conv1d(24, 24, 4, groups=12), nn.Conv1d(24, 24, 4, groups=24)
    ).to(dtype)
    model[2].float()
    originals, kept = list(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    native = ReplacedModules(kernels)
    native.replace(model)
    assert native.counts["convolutions"] == 1 and list(model)[1:] == originals[1:]
    x = torch.randn(1, 24, 40).to(dtype)
    assert torch.equal(model[0](x), originals[0](x))
    weight, bias = model[0].weight.squeeze(1), model[0].bias
    mixed = nn.functional.conv1d(x.to(weight.dtype), weight=weight.unsqueeze(1), bias=bias, padding=3, groups=24)
    assert type(mixed) is torch.Tensor and mixed.dtype == dtype and torch.equal(mixed, originals[0](x))
    assert weight.data_ptr() == originals[0].weight.data_ptr()
    state = model.state_dict()
    assert all(state[name].dtype == tensor.dtype and torch.equal(state[name], tensor) for name, tensor in kept.items())
    native.remove()
    assert list(model) == originals


@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5_moe", "lfm2_moe", "nemotron_h"])
def test_a_mixers_prompt_does_not_change_by_the_convolutions_type(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt and tokens in bfloat16, on the fused path and on transformers' modules."""
    monkeypatch.setattr("offmoe.hf.replace.float32_is_faster", lambda dtype: dtype == torch.bfloat16)
    folder = tmp_path / "model"
    save_layout(build(name).to(torch.bfloat16), folder, "published")
    logits = {}
    for path in ("auto", "eager"):
        monkeypatch.setenv("OFFMOE_DECODE", path)
        with open_tiny(folder, compile="off") as engine:
            assert engine._parts.native is not None
            assert engine._parts.native.counts["convolutions"] > 0
            with torch.inference_mode():
                logits[path] = engine.model(torch.tensor([PROMPT])).logits[0, -1].float()
            engine.generate(PROMPT, max_new_tokens=NUM_NEW, temperature=0, ignore_eos=True)
            assert engine.stats()["decode_path"] == ("fused" if path == "auto" else "eager")
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, experts_implementation="eager").eval()
    with torch.inference_mode():
        expected = plain(torch.tensor([PROMPT])).logits[0, -1].float()
    assert (logits["eager"] - expected).abs().max() < 0.05 * expected.abs().max()
