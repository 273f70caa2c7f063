"""GGUF files of many architectures: the logits of the transformers model that was converted, and its greedy ids."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from gguf_families import METADATA, make, write
from grok1_reference import grok1_logits
from makers import one_line
from places import ROOT
from test_grok1 import CONFIG, make_checkpoint

import offmoe
from offmoe.checkpoint.gguf.architectures import ARCHITECTURES, REFUSED
from offmoe.checkpoint.gguf.config import gguf_config
from offmoe.checkpoint.gguf.header import GgufHeader
from offmoe.core.errors import UnsupportedModelError

NUM_PROMPT, NUM_NEW = 12, 6
DOCS = ROOT / "docs" / "gguf.md"


@pytest.mark.parametrize("name", METADATA)
def test_logits_and_ids_are_those_of_the_converted_model(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offmoe.loader.build._gguf_dtype", lambda index: torch.float32)
    expected, path = make(name), tmp_path / "model.gguf"
    write(path, name, expected)
    ids = torch.randint(3, 100, (1, NUM_PROMPT), generator=torch.Generator().manual_seed(1))
    with offmoe.load(path, ram="4GiB", expert_slots=6) as engine:
        reply = engine.generate(ids[0].tolist(), max_new_tokens=NUM_NEW, temperature=0, ignore_eos=True).token_ids
        with torch.no_grad():
            got = engine.model(input_ids=ids).logits
    sequence = torch.tensor([[*ids[0].tolist(), *reply]])
    with torch.no_grad():
        wanted = expected(input_ids=sequence).logits
    assert torch.allclose(got, wanted[:, :NUM_PROMPT], atol=2e-4, rtol=0), float(
        (got - wanted[:, :NUM_PROMPT]).abs().max()
    )
    greedy = wanted[0, NUM_PROMPT - 1 : -1]
    chosen = greedy.gather(1, torch.tensor(reply)[:, None])[:, 0]
    assert torch.allclose(chosen, greedy.max(dim=1).values, atol=2e-4, rtol=0)


def test_grok_1_is_that_of_its_numpy_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offmoe.loader.build._gguf_dtype", lambda index: torch.float32)
    tensors, path = make_checkpoint(tmp_path / "published"), tmp_path / "model.gguf"
    write_grok(path, tensors)
    ids = torch.randint(3, 96, (NUM_PROMPT,), generator=torch.Generator().manual_seed(1)).tolist()
    doubles = {key: tensor.double().numpy() for key, tensor in tensors.items()}
    wanted = torch.from_numpy(grok1_logits(ids, doubles, CONFIG)).float()
    with offmoe.load(path, ram="4GiB", expert_slots=6) as engine, torch.no_grad():
        got = engine.model(input_ids=torch.tensor([ids])).logits[0]
    assert torch.allclose(got, wanted, atol=2e-3, rtol=0), float((got - wanted).abs().max())


def write_grok(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """As llama.cpp's converter: names alone change, and experts are stacked."""
    names = {
        "pre_attn_norm.scale": "attn_norm", "post_attn_norm.scale": "attn_output_norm",
        "pre_moe_norm.scale": "ffn_norm",
        "post_moe_norm.scale": "layer_output_norm", "moe_block.gate.weight": "ffn_gate_inp",
        "attn.q_proj.weight": "attn_q",
        "attn.k_proj.weight": "attn_k", "attn.v_proj.weight": "attn_v", "attn.o_proj.weight": "attn_output",
    }  # fmt: skip
    writer = gguf.GGUFWriter(path, "grok")
    writer.add_tokenizer_model("no_vocab")
    for key, number in (("block_count", 3), ("context_length", 256), ("embedding_length", 48), ("expert_count", 8)):
        writer.add_uint32(f"grok.{key}", number)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_expert_used_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_attn_output_scale(CONFIG["attn_output_multiplier"])
    writer.add_embedding_scale(CONFIG["embedding_multiplier_scale"])
    writer.add_logit_scale(CONFIG["output_multiplier_scale"])
    writer.add_router_logit_softcapping(30.0)
    writer.add_attn_logit_softcapping(30.0)
    writer.add_tensor("token_embd.weight", tensors["model.embed_tokens.weight"].numpy())
    writer.add_tensor("output_norm.weight", tensors["model.norm.scale"].numpy())
    for idx in range(3):
        for published, name in names.items():
            writer.add_tensor(f"blk.{idx}.{name}.weight", tensors[f"model.layers.{idx}.{published}"].numpy())
        for published, part in (("linear", "gate"), ("linear_v", "up"), ("linear_1", "down")):
            stem = f"model.layers.{idx}.moe_block.experts"
            stack = torch.stack([tensors[f"{stem}.{expert}.{published}.weight"] for expert in range(8)])
            writer.add_tensor(f"blk.{idx}.ffn_{part}_exps.weight", stack.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_every_architecture_has_its_row_in_the_documentation() -> None:
    rows = {line.split("|")[1].strip().strip("`") for line in DOCS.read_text().splitlines() if line.startswith("| `")}
    assert rows == {*ARCHITECTURES, *REFUSED} - {"clip"}


@pytest.mark.parametrize("name", sorted({*REFUSED} - {"clip"}))
def test_an_architecture_that_is_not_read_says_why(name: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        gguf_config(GgufHeader(metadata={"general.architecture": name}, tensors={}))
    assert one_line(caught).endswith(f"is not read: {REFUSED[name]}")
