"""`offmoe quantize` on models: what is written is what transformers with compressed-tensors reads, and offmoe too."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import PROMPT, leaves_nothing, open_tiny, plain_model
from families import build, save_layout
from makers import one_line
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.quantization_config import CompressedTensorsConfig

from offmoe.checkpoint.expert_index import ExpertIndex, QuantPart, plan_read
from offmoe.checkpoint.index import CheckpointIndex
from offmoe.checkpoint.locate import demo_model_folder
from offmoe.checkpoint.shard_file import ShardFile
from offmoe.core.errors import CheckpointError, OffmoeError, UnsupportedModelError, UsageError
from offmoe.formats.dense import view_expert, writable_bytes
from offmoe.formats.quantised import QuantMatrix
from offmoe.quantize.write import QuantiseOptions, QuantiseResult, quantise

WIDTHS: dict[str, object] = {"hidden_size": 64, "moe_intermediate_size": 32, "intermediate_size": 96}
INT4 = QuantiseOptions(expert_format="int4")
pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    with leaves_nothing():
        yield


def save(folder: Path, name: str = "qwen3_moe", layout: str = "published", dtype: torch.dtype = torch.float32) -> Path:
    """A tiny model whose widths are multiples of 32."""
    save_layout(build(name, dtype=dtype, overrides=WIDTHS), folder, layout)  # type: ignore[arg-type]
    return folder


def run(source: Path, target: Path, options: QuantiseOptions = INT4) -> QuantiseResult:
    return quantise(source, target, options, lambda stage, done, total: None)


def in_transformers(folder: Path, *, dequantise: bool = True, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    how = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantise else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager", **how)
    assert isinstance(model, PreTrainedModel)
    return model.eval()


def logits_of(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=torch.tensor([PROMPT]), use_cache=False).logits
    return logits


def check_equal(target: Path) -> PreTrainedModel:
    """offmoe, with a quarter of the experts, gives transformers' logits."""
    theirs = in_transformers(target)
    expected = logits_of(theirs)
    with open_tiny(target) as engine:
        got = logits_of(engine.model)
    assert float((got - expected).abs().max() / expected.abs().max()) < 1e-5
    return theirs


@pytest.mark.parametrize("layout", ["published", "stacked", "shards"])
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_transformers_and_offmoe_read_the_same_model(name: str, layout: str, tmp_path: Path) -> None:
    source = save(tmp_path / "source", name, layout)
    result = run(source, tmp_path / "target")
    theirs = check_equal(tmp_path / "target")
    whole = plain_model(source).state_dict()
    for param_name, param in theirs.state_dict().items():
        if ".experts.gate_up_proj" in param_name or ".experts.down_proj" in param_name:
            difference = (param - whole[param_name]).square().mean() / whole[param_name].square().mean()
            assert 0.002 < float(difference) < 0.012  # int4 in groups of 32 on bell-shaped numbers: about 0.0075
        else:
            assert torch.equal(param, whole[param_name])
    assert result.written_bytes < result.source_bytes


@pytest.mark.parametrize(("experts", "dense"), [("int4", "int4"), ("int4", "int8"), ("int8", "int4"), ("int8", None)])
def test_other_linear_layers(experts: str, dense: str | None, tmp_path: Path) -> None:
    source = save(tmp_path / "source", "deepseek_v3")
    options = QuantiseOptions(expert_format=experts, dense=dense)  # type: ignore[arg-type]
    result = run(source, tmp_path / "target", options)
    theirs = check_equal(tmp_path / "target")
    whole = plain_model(source).state_dict()
    params = {name: param for name, param in theirs.named_parameters() if name in whole}  # scales beside
    changed = {name for name, param in params.items() if not torch.equal(param, whole[name])}
    others = {name for name in changed if ".experts." not in name}
    assert len(others) == result.num_dense and bool(others) == (dense is not None)
    assert not {name for name in others if "norm" in name or "embed" in name or "lm_head" in name or ".gate." in name}
    if dense is not None:
        assert any("shared_experts" in name for name in others) and any("self_attn" in name for name in others)
    # Where nothing asks to dequantise, compressed-tensors keeps those layers as integers and gives the same.
    expected = logits_of(theirs)
    got = logits_of(in_transformers(tmp_path / "target", dequantise=False))
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(("dense", "head"), [(None, "int8"), ("int8", "int8"), ("int4", "int4")])
def test_the_output_head(dense: str | None, head: str, tmp_path: Path) -> None:
    source = save(tmp_path / "source", "mixtral")
    run(source, tmp_path / "target", QuantiseOptions(expert_format="int4", dense=dense, head=head))  # type: ignore[arg-type]
    theirs = check_equal(tmp_path / "target")
    whole = plain_model(source).state_dict()
    assert not torch.equal(theirs.state_dict()["lm_head.weight"], whole["lm_head.weight"])
    assert torch.equal(theirs.state_dict()["model.embed_tokens.weight"], whole["model.embed_tokens.weight"])
    got = logits_of(in_transformers(tmp_path / "target", dequantise=False))
    assert torch.allclose(got, logits_of(theirs), rtol=1e-4, atol=1e-4)


def test_a_head_of_another_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="dense is int8 and head is int4; transformers reads one format"):
        options = QuantiseOptions(expert_format="int4", dense="int8", head="int4")
        run(save(tmp_path / "source"), tmp_path / "target", options)


def test_a_head_that_is_the_embeddings_stays(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="output head is its embeddings, which stay; leave out --head"):
        run(demo_model_folder(), tmp_path / "target", QuantiseOptions(expert_format="int4", head="int8"))


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_a_bfloat16_model_has_the_same_weights_everywhere(kind: str, tmp_path: Path) -> None:
    source = save(tmp_path / "source", dtype=torch.bfloat16)
    run(source, tmp_path / "target", QuantiseOptions(expert_format=kind))  # type: ignore[arg-type]
    theirs = in_transformers(tmp_path / "target", dtype=torch.bfloat16)
    params = dict(theirs.named_parameters())
    index, experts = open_index(tmp_path / "target")
    for key in list(experts.keys()):
        layer, spans = experts.layers[key.layer_idx], experts.spans(key)
        plan = plan_read(spans, align_bytes=64)
        slot = torch.zeros(plan.slot_bytes, dtype=torch.uint8)
        for run_ in plan.runs:
            view = writable_bytes(slot[run_.slot_offset : run_.slot_offset + run_.num_bytes])
            index.files[run_.file_idx].read_into(view, run_.start, need_bytes=run_.need_bytes)
        ours = view_expert(layer, slot, plan.source_offsets)
        for name, parts in (("gate_up_proj", ours.up), ("down_proj", ours.down)):
            values = torch.cat([part.dequantise(torch.bfloat16) for part in parts if isinstance(part, QuantMatrix)])
            assert torch.equal(values, params[f"{layer.name}.{name}"][key.expert_idx])
    index.close()


def open_index(folder: Path) -> tuple[CheckpointIndex, ExpertIndex]:
    """As the engine opens it."""
    from offmoe.hf.expert_map import map_experts
    from offmoe.hf.internals import KeyMapping
    from offmoe.loader.build import build_on_meta, read_model_config

    config, quantisation = read_model_config(folder, trust_remote_code=False)
    index = CheckpointIndex.open(folder, quantisation)
    model = build_on_meta(config, index, trust_remote_code=False)
    mapping = KeyMapping(model)
    return index, map_experts(model, index, mapping, mapping.targets(index.tensors))[0]


@pytest.mark.parametrize("layout", ["published", "stacked"])
def test_an_expert_is_one_read(layout: str, tmp_path: Path) -> None:
    run(save(tmp_path / "source", layout=layout), tmp_path / "target")
    index, experts = open_index(tmp_path / "target")
    for key in list(experts.keys()):
        assert len(plan_read(experts.spans(key), align_bytes=1).runs) == 1
    for layer in experts.layers:
        parts = [part for part in (*layer.up, *layer.down) if isinstance(part, QuantPart)]
        assert [(part.format.kind, part.format.group, part.format.offset) for part in parts] == [("int4", 32, 8)] * 3
    index.close()


def test_config_says_what_was_done(tmp_path: Path) -> None:
    run(save(tmp_path / "source"), tmp_path / "target", QuantiseOptions(expert_format="int4", dense="int8", group=32))
    config = json.loads((tmp_path / "target" / "config.json").read_text())
    plain = json.loads((tmp_path / "source" / "config.json").read_text())
    quantisation = config.pop("quantization_config")
    assert config == plain
    assert quantisation["quant_method"] == "compressed-tensors" and quantisation["format"] == "pack-quantized"
    experts, dense = quantisation["config_groups"].values()
    assert (experts["weights"]["num_bits"], dense["weights"]["num_bits"]) == (4, 8)
    assert "lm_head" in quantisation["ignore"]
    assert not [name for name in quantisation["ignore"] if ".experts." in name or "self_attn.q_proj" in name]


def test_a_run_that_was_cut_off_goes_on(tmp_path: Path) -> None:
    source = save(tmp_path / "source")
    options = QuantiseOptions(expert_format="int4", shard_bytes=20_000)
    whole = run(source, tmp_path / "whole", options)
    assert whole.num_shards > 4

    def stop(stage: str, done: int, total: int) -> None:
        assert stage == "quantising"
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantise(source, tmp_path / "target", options, stop)
    with pytest.raises(OffmoeError):
        open_tiny(tmp_path / "target")
    again = run(source, tmp_path / "target", options)
    assert 0 < again.resumed < again.num_shards and again.written_bytes == whole.written_bytes
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert sorted(path.name for path in (tmp_path / "target").iterdir()) == names
    for name in names:
        assert (tmp_path / "target" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    check_equal(tmp_path / "target")


def test_a_model_of_one_shard_goes_on_within_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save(tmp_path / "source")
    options = QuantiseOptions(expert_format="int4")
    whole = run(source, tmp_path / "whole", options)
    assert whole.num_shards == 1

    def stop(stage: str, done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantise(source, tmp_path / "target", options, stop)
    read: list[int] = []
    read_into = ShardFile.read_into

    def counted(file: ShardFile, view: memoryview, start: int, **more: Any) -> None:
        read.append(len(view))
        read_into(file, view, start, **more)

    monkeypatch.setattr(ShardFile, "read_into", counted)
    run(source, tmp_path / "target", options)
    assert sum(read) < 0.7 * whole.source_bytes, "what was written is not read again"
    monkeypatch.undo()
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "target" / path.name).read_bytes() == path.read_bytes()
    assert len(list((tmp_path / "target").iterdir())) == len(list((tmp_path / "whole").iterdir()))


def test_a_run_is_not_gone_on_with_from_another_source(tmp_path: Path) -> None:
    source = save(tmp_path / "source")

    def stop(stage: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantise(source, tmp_path / "target", INT4, stop)
    with pytest.raises(UsageError, match="unfinished run with another experts"):
        run(source, tmp_path / "target", QuantiseOptions(expert_format="int8"))
    path = source / "model.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt"})
    with pytest.raises(UsageError, match="unfinished run with another source"):
        run(source, tmp_path / "target")


@pytest.mark.parametrize(
    ("name", "words"),
    [("gpt_oss", "are stored turned"), ("granitemoe", "no names of one expert each"), ("nemotron_h", None)],
)
def test_families_without_such_names(name: str, words: str | None, tmp_path: Path) -> None:
    source = save_family(tmp_path / "source", name)
    if words is None:  # up and down without a gate, one tensor an expert: nothing is missing
        run(source, tmp_path / "target")
        check_equal(tmp_path / "target")
        return
    with pytest.raises(UnsupportedModelError, match=words) as caught:
        run(source, tmp_path / "target")
    one_line(caught)
    assert not (tmp_path / "target").exists()


def save_family(folder: Path, name: str) -> Path:
    overrides: dict[str, object] = {"nemotron_h": {"moe_intermediate_size": 32}}.get(name, {})
    save_layout(build(name, overrides=overrides), folder, "published")
    return folder


def test_a_group_that_does_not_divide(tmp_path: Path) -> None:
    source = save(tmp_path / "source")
    with pytest.raises(UsageError) as caught:
        run(source, tmp_path / "target", QuantiseOptions(expert_format="int4", group=64))
    assert one_line(caught) == (
        "--group 64 does not divide the 32 columns of 'model.layers.0.mlp.experts.0.down_proj'; use --group 32"
    )
    odd = tmp_path / "odd"
    save_layout(build("qwen3_moe"), odd, "published")
    with pytest.raises(UsageError, match=r"widths of 20 and 48, and none of 32, 64, 128 divides them all"):
        run(odd, tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_a_source_that_is_quantised(tmp_path: Path) -> None:
    run(save(tmp_path / "source"), tmp_path / "target")
    with pytest.raises(UsageError, match=r"is quantised already \(compressed-tensors\)"):
        run(tmp_path / "target", tmp_path / "again")


def test_a_source_with_numbers_that_are_none(tmp_path: Path) -> None:
    source = save(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.2.mlp.experts.3.up_proj.weight"][2, 5] = float("nan")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"experts\.3\.up_proj\.weight' holds numbers that are not finite"):
        run(source, tmp_path / "target")
    assert not (tmp_path / "target" / "config.json").exists()
