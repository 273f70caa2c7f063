"""Resident linears that stay quantised: what they give, what they take, and that they end with the engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engines import PROMPT, open_tiny
from families import build, save_layout
from torch import nn

import offmoe
from offmoe.core.errors import EngineClosedError
from offmoe.kernels.cpu.loader import usable_levels
from offmoe.quantize.write import QuantiseOptions, quantise

pytestmark = pytest.mark.skipif(not usable_levels(), reason="the CPU kernels were not built")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of qwen3_moe, in a width that groups of 32 divide; everything that can be is int4."""
    base = tmp_path_factory.mktemp("quantised")
    widths: dict[str, object] = {"hidden_size": 64, "moe_intermediate_size": 32, "intermediate_size": 96}
    save_layout(build("qwen3_moe", overrides=widths), base / "plain", "published")
    quantise(base / "plain", base / "int4", QuantiseOptions(expert_format="int4", dense="int4"), lambda *_: None)
    return base / "int4"


def kept(engine: offmoe.Engine) -> list[nn.Linear]:
    return [m for m in engine.model.modules() if isinstance(m, nn.Linear) and "offmoe_codes" in dict(m.named_buffers())]


def test_they_stay_as_they_are_stored(folder: Path) -> None:
    with open_tiny(folder, compile="off") as engine:
        linears = kept(engine)
        assert linears
        for linear in linears:
            assert linear.weight.is_meta
            assert sum(b.nbytes for b in linear.buffers()) < linear.weight.numel() * linear.weight.element_size() / 2


def test_few_rows_and_many_give_the_same_values(folder: Path) -> None:
    with open_tiny(folder, compile="off") as engine, torch.inference_mode():
        for linear in kept(engine):
            x = torch.randn(40, linear.in_features)
            torch.testing.assert_close(linear(x)[:3], linear(x[:3]), rtol=1e-4, atol=1e-5)


def test_without_kernels_they_are_values_and_the_ids_are_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_tiny(folder, compile="off") as engine:
        expected = engine.generate(PROMPT, max_new_tokens=8, temperature=0, ignore_eos=True).token_ids
    monkeypatch.setenv("OFFMOE_CPU_KERNELS", "off")
    with open_tiny(folder, compile="off") as engine:
        assert not kept(engine)
        assert engine.generate(PROMPT, max_new_tokens=8, temperature=0, ignore_eos=True).token_ids == expected


def test_a_closed_engines_linears_say_so(folder: Path) -> None:
    with open_tiny(folder, compile="off") as engine:
        linear = kept(engine)[0]
    with torch.inference_mode(), pytest.raises(EngineClosedError, match="closed"):
        linear(torch.randn(1, linear.in_features))
