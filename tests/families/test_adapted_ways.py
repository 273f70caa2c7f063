"""Families served through an adapter beside the plain way of test_adapters: on a device, in bfloat16, quantised."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted_families import ADAPTED, ENCODER_DECODERS, build_adapted, nllb_as_published
from engines import load
from families import save_layout
from makers import Measured
from quant_makers import Scheme, decompressed_model
from safetensors.torch import load_file
from transformers import PreTrainedModel
from transformers.models.nllb_moe import modeling_nllb_moe

import offmoe
from offmoe.core.errors import UnsupportedModelError
from offmoe.quantize.write import QuantiseOptions, quantise
from offmoe.tiers.device import SimulatedDevice

NUM_SLOTS = 6
_SURPLUS = re.compile(r"experts\.(8|9|10|11)\.")
MISSES = ("stream", "cpu", "auto")
# Published stacked, or turned: no names that other engines read for one expert.
NOT_QUANTISED = ("dbrx", "jetmoe", "llama4", "step3p7")
INT4 = tuple(name for name in ADAPTED if not name.startswith(NOT_QUANTISED))


@pytest.fixture(autouse=True)
def _nllb(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(modeling_nllb_moe.NllbMoeExperts, "forward", nllb_as_published)
    return iter((None,))


def inputs(name: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    found = {"input_ids": torch.randint(3, 100, (2, 12), generator=generator)}
    if name in ENCODER_DECODERS:
        found["decoder_input_ids"] = torch.randint(3, 100, (2, 5), generator=generator)
    return found


def logits_of(model: Any, name: str) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(**inputs(name), use_cache=False).logits
    return logits.float()


def greedy(model: PreTrainedModel, ids_T: torch.Tensor, name: str) -> list[int]:
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    start = 1 if name in ENCODER_DECODERS else len(ids_T)
    new: list[int] = model.generate(ids_T[None], **options)[0, start:].tolist()
    return new


def check_equal(
    folder: Path, expected: PreTrainedModel, name: str, measured: Callable[[torch.Tensor, torch.Tensor], None],
    **options: Any,
) -> None:  # fmt: skip
    """offmoe's logits within 1e-5, the same greedy ids, experts that came and went."""
    ids_T, wanted = inputs(name)["input_ids"][0], logits_of(expected, name)
    with load(folder, ram="4GiB", expert_slots=NUM_SLOTS, **options) as engine:
        measured(logits_of(engine.model, name), wanted)
        reply = engine.generate(ids_T.tolist(), max_new_tokens=8, temperature=0, ignore_eos=True)
        assert list(reply.token_ids) == greedy(expected, ids_T, name)
        assert engine.stats()["misses"] > 0


@pytest.mark.parametrize("name", ADAPTED)
def test_on_a_device(name: str, tmp_path: Path, measured: Measured) -> None:
    """Experts in device slots; each family's misses are copied, computed in RAM, or either."""
    model = build_adapted(name)
    save_layout(model, tmp_path, "published")
    miss = MISSES[list(ADAPTED).index(name) % len(MISSES)]
    check_equal(tmp_path, model, name, partial(measured, name, "device"), miss=miss, simulated=SimulatedDevice(1e9))


@pytest.mark.parametrize("name", ADAPTED)
def test_in_bfloat16(name: str, tmp_path: Path) -> None:
    """As near to float32 as transformers in bfloat16 is (half of the tokens: in others another expert may be chosen
    after rounding), and the cache changes no bit.
    """
    half = build_adapted(name).bfloat16()
    save_layout(half, tmp_path, "published")
    exact, theirs = logits_of(copy.deepcopy(half).float(), name), logits_of(half, name)
    with offmoe.load(tmp_path, ram="4GiB", expert_slots=NUM_SLOTS) as engine:
        assert engine.model.dtype == torch.bfloat16
        ours = logits_of(engine.model, name)
        with engine._parts.uncached():
            assert torch.equal(logits_of(engine.model, name), ours)
        assert engine.stats()["misses"] > 0
    assert far(ours, exact) < max(2 * far(theirs, exact), 0.01)


def far(logits_BTV: torch.Tensor, exact_BTV: torch.Tensor) -> float:
    """Half of the tokens are nearer than this, as a share of the largest logit."""
    return float((logits_BTV - exact_BTV).abs().amax(-1).median() / exact_BTV.abs().max())


@pytest.mark.skipif(sys.version_info < (3, 11), reason="compressed-tensors needs Python 3.11")
@pytest.mark.parametrize("name", INT4)
def test_quantised(name: str, tmp_path: Path, measured: Measured) -> None:
    save_layout(build_adapted(name, width=64), tmp_path / "source", "published")
    target = tmp_path / "target"
    result = quantise(tmp_path / "source", target, QuantiseOptions(expert_format="int4"), lambda *_: None)
    assert result.num_experts > 0 and result.written_bytes < result.source_bytes
    # transformers has matrices for LongCat's experts that compute nothing, too. They are not read, nor written.
    whole = load_file(tmp_path / "source" / "model.safetensors")
    surplus = {key: tensor for key, tensor in whole.items() if name == "longcat_flash" and _SURPLUS.search(key)}
    expected = decompressed_model(target, Scheme(bits=4, group=32), added=surplus)
    check_equal(target, expected, name, partial(measured, name, "int4"))


@pytest.mark.parametrize("name", NOT_QUANTISED)
def test_families_that_are_not_quantised(name: str, tmp_path: Path) -> None:
    save_layout(build_adapted(name, width=64), tmp_path / "source", "published")
    with pytest.raises(UnsupportedModelError, match=r"stored turned|no names of one expert each"):
        quantise(tmp_path / "source", tmp_path / "target", QuantiseOptions(expert_format="int4"), lambda *_: None)
    assert not (tmp_path / "target").exists()
