"""GPTQ and AWQ checkpoints: written anew with the same values, which are those of the published layouts."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import fail, last_json, succeed
from families import build
from makers import one_line
from quant_makers import WIDTHS
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import offmoe
from offmoe.core.errors import CheckpointError, UnsupportedModelError
from offmoe.formats.repack import repack
from offmoe.quantize.write import QuantiseOptions, quantise

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True, kw_only=True)
class Form:
    """A published form. `symmetric`: every zero point is the middle."""

    packing: Any
    bits: int = 4
    group: int = 16
    symmetric: bool = False

    @property
    def config(self) -> dict[str, Any]:
        if self.packing == "awq":
            return {"quant_method": "awq", "bits": 4, "group_size": self.group, "zero_point": True, "version": "gemm"}
        return {
            "quant_method": "gptq", "bits": self.bits, "group_size": self.group, "sym": self.symmetric,
            "desc_act": False, "checkpoint_format": self.packing,
        }  # fmt: skip


FORMS = {
    "gptq": Form(packing="gptq", symmetric=True),
    "gptq asymmetric": Form(packing="gptq"),
    "gptq v2": Form(packing="gptq_v2"),
    "gptq 8 bits": Form(packing="gptq", bits=8, symmetric=True),
    "gptq whole rows": Form(packing="gptq", group=-1, symmetric=True),
    "awq": Form(packing="awq"),
}


def words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """The last dimension, P codes of which become a word, lowest bits first."""
    places = torch.arange(0, 32, bits)
    joined = (codes.view(*codes.shape[:-1], -1, 32 // bits).long() << places).sum(-1)
    return torch.where(joined >= 1 << 31, joined - (1 << 32), joined).int()


def encode(weight_NK: torch.Tensor, form: Form) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The published tensors of a matrix, and its values."""
    generator = torch.Generator().manual_seed(weight_NK.numel())
    num_outputs, num_inputs = weight_NK.shape
    group = num_inputs if form.group == -1 else form.group
    top, shape_GN = 1 << form.bits, (num_inputs // group, num_outputs)
    codes_KN = torch.randint(0, top, (num_inputs, num_outputs), generator=generator)
    zeros_GN = (
        torch.full(shape_GN, top // 2) if form.symmetric else torch.randint(0, top, shape_GN, generator=generator)
    )
    scales_GN = (torch.rand(shape_GN, generator=generator) * 0.5 / top).half()
    of = torch.arange(num_inputs) // group
    values = (codes_KN - zeros_GN[of]).float() * scales_GN[of].float()
    if form.packing == "awq":
        order = torch.tensor(AWQ_ORDER)
        turned = [part.view(len(part), -1, 8)[:, :, order].flatten(1) for part in (codes_KN, zeros_GN)]
        qweight, qzeros = (words(part, 4) for part in turned)
        return {"qweight": qweight, "qzeros": qzeros, "scales": scales_GN}, values.t().contiguous()
    qzeros = words(zeros_GN, form.bits)
    if form.packing == "gptq":  # less by one, borrowing across the codes of a word
        qzeros = qzeros - sum(1 << shift for shift in range(0, 32, form.bits))
    parts = {"qweight": words(codes_KN.t(), form.bits).t().contiguous(), "qzeros": qzeros, "scales": scales_GN}
    return {**parts, "g_idx": of.int()}, values.t().contiguous()


def save(folder: Path, form: Form, name: str = "qwen3_moe") -> Path:
    """A tiny checkpoint, and beside it the plain one with the same values, whose folder is returned."""
    plain = folder.with_name(folder.name + "-plain")
    build(name, overrides=WIDTHS).save_pretrained(plain)
    written, values = {}, load_file(plain / "model.safetensors")
    for key, tensor in list(values.items()):
        if not key.endswith("proj.weight"):
            written[key] = tensor
            continue
        parts, values[key] = encode(tensor, form)
        written |= {f"{key.removesuffix('weight')}{part}": value for part, value in parts.items()}
    save_file(values, plain / "model.safetensors", metadata={"format": "pt"})
    folder.mkdir()
    save_file(written, folder / "model.safetensors")
    config = json.loads((plain / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": form.config}))
    return plain


@pytest.mark.parametrize("case", FORMS)
def test_logits_are_those_of_the_same_values(case: str, tmp_path: Path) -> None:
    form = FORMS[case]
    plain = save(tmp_path / "published", form)
    done = succeed("quantize", tmp_path / "published", tmp_path / "out", "--expert-format", f"int{form.bits}", "--json")
    result = last_json(done.stdout)
    assert result["repacked"] == 3 * 4 + 3 + 2 * 3 * 8  # attention, one dense layer, experts of two
    ids = torch.randint(3, 100, (1, 12), generator=torch.Generator().manual_seed(1))
    expected: Any = AutoModelForCausalLM.from_pretrained(plain, attn_implementation="eager")
    with torch.no_grad():
        wanted = expected(input_ids=ids).logits
    with offmoe.load(tmp_path / "out", ram="4GiB", expert_slots=4) as engine, torch.no_grad():
        got = engine.model(input_ids=ids).logits
    assert float((got - wanted).abs().max() / wanted.abs().max()) < 1e-5


def test_a_run_that_was_cut_off_goes_on_within_its_shard(tmp_path: Path) -> None:
    save(tmp_path / "published", FORMS["awq"])
    options = QuantiseOptions(expert_format="int4")
    quantise(tmp_path / "published", tmp_path / "whole", options, lambda *_: None)

    def stop(stage: str, done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantise(tmp_path / "published", tmp_path / "target", options, stop)
    assert int(next((tmp_path / "target").glob("*.progress")).read_text()) > 0
    quantise(tmp_path / "published", tmp_path / "target", options, lambda *_: None)
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "target" / path.name).read_bytes() == path.read_bytes()
    assert len(list((tmp_path / "target").iterdir())) == len(list((tmp_path / "whole").iterdir()))


@pytest.mark.skipif(sys.version_info < (3, 11), reason="compressed-tensors needs Python 3.11")
def test_awq_becomes_what_compressed_tensors_makes_of_it() -> None:
    from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter

    parts, _ = encode(torch.zeros(64, 128), FORMS["awq"])
    named = {f"layer.{part}": tensor.clone() for part, tensor in parts.items()}
    theirs = AutoAWQConverter(group_size=16).process(named)
    ours = repack("awq", 4, parts["qweight"], parts["scales"], parts["qzeros"], None, symmetric=False, name="layer")
    assert torch.equal(ours.codes, theirs["layer.weight_packed"])
    assert torch.equal(ours.scales, theirs["layer.weight_scale"])
    assert ours.zeros is not None
    assert torch.equal(ours.zeros, theirs["layer.weight_zero_point"])


def test_columns_in_the_order_of_activations_are_refused() -> None:
    parts, _ = encode(torch.zeros(32, 64), FORMS["gptq"])
    columns = parts["g_idx"].flip(0)
    with pytest.raises(UnsupportedModelError) as caught:
        repack("gptq", 4, parts["qweight"], parts["scales"], parts["qzeros"], columns, symmetric=True, name="layer")
    assert "'layer' has its columns in the order of activations (desc_act)" in one_line(caught)


def test_zero_points_that_contradict_the_config_are_refused() -> None:
    parts, _ = encode(torch.zeros(32, 64), FORMS["gptq asymmetric"])
    with pytest.raises(
        CheckpointError, match="says that the codes are symmetric, 'layer' has zero points other than 8"
    ):
        repack("gptq", 4, parts["qweight"], parts["scales"], parts["qzeros"], None, symmetric=True, name="layer")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another group": ({"group_size": 32}, "config.json says groups of 32"),
    "3 bits": ({"bits": 3}, "GPTQ of 3 bits, format 'gptq' (known: 4 or 8 bits; gptq, gptq_v2)"),
    "marlin": ({"checkpoint_format": "marlin"}, "format 'marlin'"),
    "no number": ({"bits": "four"}, "says 'four' bits"),
    "other bits": ({}, "is gptq of 4 bits and keeps its values; use --expert-format int4"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_read_is_refused_and_leaves_nothing(case: str, tmp_path: Path) -> None:
    changes, message = REFUSED[case]
    save(tmp_path / "published", FORMS["gptq"])
    path = tmp_path / "published" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= changes
    path.write_text(json.dumps(config))
    bits = "int8" if case == "other bits" else "int4"
    assert message in fail("quantize", tmp_path / "published", tmp_path / "out", "--expert-format", bits)
    assert not (tmp_path / "out").exists()


def test_a_part_that_is_missing_is_named(tmp_path: Path) -> None:
    save(tmp_path / "published", FORMS["awq"])
    path = tmp_path / "published" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.0.mlp.experts.3.up_proj.scales"]
    save_file(tensors, path)
    line = fail("quantize", tmp_path / "published", tmp_path / "out", "--expert-format", "int4")
    assert "model.layers.0.mlp.experts.3.up_proj.qweight has no scales" in line
