"""`fast_activations`: what it changes in an engine, where that is said, and what it is said to cost."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from commands import fail, last_json, succeed
from engines import PROMPT, assert_at_rest, leaves_nothing, open_tiny
from families import build, save_layout
from torch import nn

import offmoe
from offmoe.base.errors import UsageError
from offmoe.kernels.cpu.kernels import CpuKernels
from offmoe.kernels.cpu.loader import usable_levels
from offmoe.kernels.int8_activations import round_activations
from offmoe.models.native import MATRIX_NAME
from offmoe.models.quantise import QuantiseOptions, quantise
from offmoe.report.perplexity import perplexity
from offmoe.report.price import own_text, price
from offmoe.tiers.device import SimulatedDevice

pytestmark = pytest.mark.skipif(not usable_levels(), reason="the CPU kernels were not built")

FAST = {"fast_activations": True}
TEXT = "def read_lines(path):\n    with open(path) as file:\n        return file.read().splitlines()\n"


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    with leaves_nothing():
        yield


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny qwen3_moe in a width that groups of 32 divide."""
    widths: dict[str, object] = {"hidden_size": 64, "moe_intermediate_size": 32, "intermediate_size": 96}
    folder = tmp_path_factory.mktemp("plain")
    save_layout(build("qwen3_moe", overrides=widths), folder, "published")
    return folder


@pytest.fixture(scope="module")
def int4(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with everything that can be in int4."""
    folder = tmp_path_factory.mktemp("int4") / "model"
    quantise(plain, folder, QuantiseOptions(experts="int4", dense="int4"), lambda *_: None)
    return folder


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model with experts in int8, and its tokenizer."""
    folder = tmp_path_factory.mktemp("demo") / "model"
    options = QuantiseOptions(experts="int8", dense="int8")
    quantise(offmoe.checkpoint.locate.demo_model_folder(), folder, options, lambda *_: None)
    return folder


@torch.inference_mode()
def logits(engine: offmoe.Engine, num_tokens: int = 40) -> torch.Tensor:
    ids = torch.arange(1, 1 + num_tokens)[None]
    found: torch.Tensor = engine.model(input_ids=ids, use_cache=False).logits
    return found


def test_it_is_off_and_replies_say_when_it_is_on(int4: Path) -> None:
    with open_tiny(int4) as engine:
        reply = engine.generate(PROMPT, max_new_tokens=3)
        assert engine.config.fast_activations is False
        assert engine.lossy == reply.stats.lossy == ()
        assert engine.stats()["lossy"] == reply.stats.as_dict()["lossy"] == []
        assert "exact" not in reply.stats.line()
    with open_tiny(int4, **FAST) as engine:
        reply = engine.generate(PROMPT, max_new_tokens=3)
        assert engine.lossy == reply.stats.lossy == ("int8 activations",)
        assert engine.stats()["lossy"] == reply.stats.as_dict()["lossy"] == ["int8 activations"]
        assert engine.stats()["cpu_kernels"][0].endswith(", int8 activations")
        assert reply.stats.line().endswith(" | not exact: int8 activations")
        (note,) = engine.stats()["notes"]
        assert re.match(r"int8 activations: what the CPU computes of experts and \d+ linear layers is of", note)


def test_linears_are_products_of_rounded_activations_whatever_the_number_of_rows(int4: Path) -> None:
    with open_tiny(int4, **FAST) as engine, torch.inference_mode():
        linears = [module for module in engine.model.modules() if MATRIX_NAME in vars(module)]
        assert linears
        for linear in linears:
            assert isinstance(linear, nn.Linear)
            values_KN = vars(linear)[MATRIX_NAME].dequantise(torch.float64).t()
            x_KT = torch.randn(linear.in_features, 40)  # a row is no contiguous one
            expected = round_activations(x_KT.t()) @ values_KN
            for num_rows in (1, 3, 40):
                got = linear(x_KT.t()[:num_rows]).double()
                torch.testing.assert_close(got, expected[:num_rows], rtol=1e-4, atol=1e-5)


def test_within_exact_activations_nothing_is_rounded(int4: Path) -> None:
    with open_tiny(int4) as engine:
        expected = logits(engine)
    with open_tiny(int4, **FAST) as engine:
        rounded = logits(engine)
        with engine.exact_activations():
            assert engine.lossy == () and torch.equal(logits(engine), expected)
        assert torch.equal(logits(engine), rounded) and not torch.equal(rounded, expected)
        assert (rounded - expected).abs().mean() < 0.1 * expected.abs().mean()
        assert_at_rest(engine)


def test_a_token_is_rounded_alike_alone_and_among_others(int4: Path) -> None:
    """Prompts and decoding are the same arithmetic: so what is priced by reading texts holds for what is written."""
    with open_tiny(int4, experts=16, **FAST) as engine:
        ids, at_once = list(range(1, 13)), logits(engine, 12)[0, -1]
        last: list[torch.Tensor] = []

        def choose(_: torch.Tensor, row: torch.Tensor) -> int:
            last.append(row[0])
            return ids[len(last)] if len(last) < len(ids) else 0

        engine.generate(ids[:1], max_new_tokens=len(ids), choose=choose, ignore_end=True)
        torch.testing.assert_close(last[-1], at_once, rtol=1e-3, atol=1e-3 * float(at_once.abs().max()))


def test_the_price(int4: Path) -> None:
    ids = list(range(1, 60))
    with open_tiny(int4, **FAST) as engine:
        steps: list[int] = []
        found = price(engine, ids, lambda done, total: steps.append(done))
        lossy, lossy_TV = perplexity(engine, ids), logits(engine, 59)[0, :-1].double().log_softmax(-1)
        with engine.exact_activations():
            exact, exact_TV = perplexity(engine, ids), logits(engine, 59)[0, :-1].double().log_softmax(-1)
    assert steps[-1] == found.exact.num_tokens == found.lossy.num_tokens == 58
    assert (found.exact.value, found.lossy.value) == pytest.approx((exact.value, lossy.value), rel=1e-5)
    assert found.change == pytest.approx(lossy.value / exact.value - 1, abs=1e-5)
    kl_T = (exact_TV.exp() * (exact_TV - lossy_TV)).sum(-1)
    assert found.kl_per_token == pytest.approx(float(kl_T.mean()), rel=0.02) and found.kl_per_token > 0
    assert found.largest_kl == pytest.approx(float(kl_T.max()), rel=0.02)
    assert found.same == int((exact_TV.argmax(-1) == lossy_TV.argmax(-1)).sum())
    assert found.line().startswith(f"perplexity {found.exact.value:.4f} -> {found.lossy.value:.4f} (")


def test_the_models_own_text_is_of_exact_activations(int4: Path) -> None:
    with open_tiny(int4) as engine:
        expected = own_text(engine, PROMPT, 5)
    with open_tiny(int4, context_length=64, **FAST) as engine:
        assert own_text(engine, PROMPT, 5) == expected and len(expected) == len(PROMPT) + 5
        assert len(own_text(engine, PROMPT, 500)) == 64


def test_where_nothing_is_rounded_nothing_is_said_to_be(plain: Path) -> None:
    with open_tiny(plain) as engine:
        expected = logits(engine)
    with open_tiny(plain, **FAST) as engine:
        assert engine.lossy == () and torch.equal(logits(engine), expected)
        assert engine.stats()["notes"][0].startswith("fast_activations changes nothing here: no weights of int4")


@pytest.mark.parametrize(("miss", "label"), [("cpu", ("int8 activations",)), ("stream", ())])
def test_beside_a_device_it_is_of_experts_that_the_cpu_computes(int4: Path, miss: str, label: tuple[str, ...]) -> None:
    device = SimulatedDevice(1e12, capacity_bytes=1 << 30)
    with offmoe.load(int4, ram="4GiB", vram="200MiB", experts=4, miss=miss, _device=device, **FAST) as engine:
        assert engine.lossy == label
        engine.generate(PROMPT, max_new_tokens=3)


def test_what_is_refused(int4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="fast_activations is 'yes'; use True or False"):
        open_tiny(int4, fast_activations="yes")
    with pytest.raises(UsageError, match="compile is on, which fast_activations does not reach on the CPU"):
        open_tiny(int4, compile="on", **FAST)
    monkeypatch.setattr(CpuKernels, "rounds_activations", property(lambda self: False, lambda self, on: None))
    with pytest.raises(UsageError, match="products of int4 weights are not what the reference says"):
        open_tiny(int4, **FAST)
    monkeypatch.setenv("OFFMOE_CPU_KERNELS", "off")
    with pytest.raises(UsageError, match="needs the CPU kernels, and there are none: switched off"):
        open_tiny(int4, **FAST)


def test_verify_says_what_it_costs(demo: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    flags = ("--ram", "4GiB", "--max-new-tokens", 2, "--fast-activations", "--eval", tmp_path / "text.txt")
    lines = succeed("verify", demo, *flags).stdout.splitlines()
    assert lines[3] == "cached output equals uncached output, both with int8 activations"
    number = r"([\d.e+-]+)"
    found = re.fullmatch(
        rf"int8 activations on (\d+) tokens of the text: perplexity {number} -> {number} \({number}%\), "
        rf"KL {number} nats a token \(largest {number}\), the same best next token for (\d+) of \1",
        lines[4],
    )
    assert found is not None, lines[4]
    assert abs(float(found[4])) < 3 and 0 < float(found[5]) < 0.05
    record = last_json(succeed("verify", demo, *flags, "--json").stdout)
    assert record["passed"] and record["fast_activations"]["tokens"] == int(found[1])
    assert record["fast_activations"]["perplexity"] == pytest.approx(float(found[3]), rel=1e-3)


def test_verify_of_a_model_that_it_does_not_change() -> None:
    flags = ("--ram", "4GiB", "--max-new-tokens", 2, "--fast-activations")
    assert succeed("verify", *flags).stdout.splitlines()[4].startswith("fast_activations changes nothing here")
    assert "--eval is what --fast-activations is priced on" in fail("verify", "--eval", "text.txt")
    assert "--eval no-such-file cannot be read" in fail("verify", *flags, "--eval", "no-such-file")


def test_commands_take_the_flag_and_say_so(demo: Path) -> None:
    flags = ("--ram", "4GiB", "--fast-activations")
    result = succeed("generate", demo, "--prompt", "import os", "--max-new-tokens", 2, *flags)
    assert result.stderr.count("int8 activations") == 2  # before, with the plan, and in the statistics
    record = last_json(succeed("bench", demo, "--prefill", 8, "--decode", 2, *flags).stdout)
    assert record["settings"]["fast_activations"] is True and record["lossy"] == ["int8 activations"]
    chat = succeed("chat", demo, "--json", "--max-new-tokens", 2, *flags, stdin="hello\n")
    assert last_json(chat.stdout)["lossy"] == ["int8 activations"]
