"""Public reports of people who run such models, each tried on a small made input and held to the right value.

A test's docstring names the report. The right value is transformers' on the same folder, or what the report asks for.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import fail, last_json, succeed
from engines import PROMPT, open_tiny, plain_model, save_tiny
from families import build, save_layout
from makers import one_line
from quant_makers import Scheme, decompressed_model, save_compressed
from safetensors.torch import load_file, save_file
from small_edits import always, byte_tokenizer, edit_json

import offmoe
from offmoe.core.errors import OffmoeError

IDS = torch.tensor([PROMPT])
FINE = {"rtol": 2e-5, "atol": 2e-5}


def save_qwen(folder: Path, **overrides: object) -> Path:
    """A tiny Qwen3-MoE with other config values."""
    folder.mkdir(parents=True, exist_ok=True)
    save_layout(build("qwen3_moe", overrides=overrides), folder, "published")
    return folder


def same_logits(folder: Path, expected: torch.Tensor | None = None, **options: Any) -> None:
    """offmoe's logits are transformers' on the same folder."""
    if expected is None:
        with torch.inference_mode():
            expected = plain_model(folder)(IDS).logits
    with open_tiny(folder, **options) as engine, torch.inference_mode():
        torch.testing.assert_close(engine.model(IDS).logits.float(), expected, **FINE)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def copy_of_tiny(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model"))


# Routing ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [1, 5, 8])
def test_more_experts_a_token_than_the_model_was_made_for(tmp_path: Path, top_k: int) -> None:
    """https://github.com/LostRuins/koboldcpp/issues/1865 fails above 22 of 128 experts, textgen#6607 cannot set it."""
    folder = save_qwen(tmp_path / "model")
    edit_json(folder / "config.json", num_experts_per_tok=top_k)
    same_logits(folder, expert_slots=8)


def test_an_odd_number_of_experts(tmp_path: Path) -> None:
    """https://github.com/arcee-ai/mergekit/issues/113: not possible in llama.cpp."""
    same_logits(save_qwen(tmp_path / "model", num_experts=3, num_experts_per_tok=2), expert_slots=2)


def test_experts_that_are_all_alike_and_a_router_of_zeros(tmp_path: Path) -> None:
    """https://github.com/arcee-ai/mergekit/issues/93: every score ties; the choice among ties is transformers'."""
    folder = save_qwen(tmp_path / "model")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name in tensors:
        if name.endswith("mlp.gate.weight"):
            tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, path, metadata={"format": "pt"})
    same_logits(folder)


@pytest.mark.parametrize("head_dim", [8, 32])
def test_heads_that_do_not_fill_the_models_width(tmp_path: Path, head_dim: int) -> None:
    """https://github.com/ggml-org/llama.cpp/issues/22524: attn_q 'has wrong shape' where heads * head size != width."""
    same_logits(save_qwen(tmp_path / "model", head_dim=head_dim))


# Files --------------------------------------------------------------------------------------------------------------


def test_every_shard_holds_a_shared_tensor(copy_of_tiny: Path) -> None:
    """https://github.com/ml-explore/mlx-examples/pull/1100: "every shard had the same keys"; a wrong model."""
    folder = copy_of_tiny
    with torch.inference_mode():
        expected = plain_model(folder)(IDS).logits
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    first = {name: tensors[name] for name in names[::2]}
    second = {name: tensors[name] for name in names[1::2]} | {"model.norm.weight": tensors["model.norm.weight"]}
    first["model.norm.weight"] = tensors["model.norm.weight"]
    (folder / "model.safetensors").unlink()
    for idx, part in enumerate((first, second), 1):
        save_file(part, folder / f"model-{idx:05}-of-00002.safetensors", metadata={"format": "pt"})
    where = dict.fromkeys(first, "model-00001-of-00002.safetensors")
    where |= dict.fromkeys(second, "model-00002-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    same_logits(folder, expected)


def test_a_pointer_file_in_place_of_weights(copy_of_tiny: Path) -> None:
    """https://github.com/deepseek-ai/DeepSeek-V3/issues/557 and nine more: a clone without git-lfs, HeaderTooLarge."""
    (copy_of_tiny / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:" + "4d" * 32 + "\nsize 4976698672\n"
    )
    for command in ("inspect", "plan"):
        text = fail(command, copy_of_tiny)
        assert "Git LFS" in text and "git lfs pull" in text, text
    with pytest.raises(OffmoeError, match="git lfs pull"):
        open_tiny(copy_of_tiny)


def test_a_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    """sglang#32279 (weights left at random, in silence), colibri#1317 (141 of 142 files: "missing tensor")."""
    save_layout(build("qwen3_moe"), tmp_path, "shards")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    gone = shards[len(shards) // 2]
    gone.unlink()
    for command in ("inspect", "plan"):
        assert gone.name in fail(command, tmp_path)
    with pytest.raises(OffmoeError, match=gone.name):
        open_tiny(tmp_path)


def test_an_index_of_files_that_were_renamed(tmp_path: Path) -> None:
    """mlx-vlm#1827, CoSER#3: 15 shards that are complete beside an index that names 30; the headers know better."""
    save_layout(build("qwen3_moe"), tmp_path, "shards")
    with torch.inference_mode():
        expected = plain_model(tmp_path)(IDS).logits
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    for idx, shard in enumerate(shards, 1):
        shard.rename(tmp_path / f"part-{idx:02}-of-{len(shards):02}.safetensors")
    same_logits(tmp_path, expected)


def test_scales_of_an_fp8_kv_cache_are_not_needed(copy_of_tiny: Path) -> None:
    """https://github.com/sgl-project/sglang/issues/39942; keys and values are not quantised here."""
    path = copy_of_tiny / "model.safetensors"
    with torch.inference_mode():
        expected = plain_model(copy_of_tiny)(IDS).logits
    tensors = load_file(path)
    for layer in range(3):
        for name in ("k_proj.k_scale", "v_proj.v_scale"):
            tensors[f"model.layers.{layer}.self_attn.{name}"] = torch.tensor(0.02)
    save_file(tensors, path, metadata={"format": "pt"})
    same_logits(copy_of_tiny, expected)


def test_mlx_quantised_weights_are_refused_by_name(copy_of_tiny: Path) -> None:
    """https://github.com/ml-explore/mlx-lm/issues/1259: '2170 parameters not in model'."""
    edit_json(copy_of_tiny / "config.json", quantization={"group_size": 64, "bits": 4, "mode": "affine"})
    for command in ("inspect", "plan"):
        assert "mlx" in fail(command, copy_of_tiny).lower()
    with pytest.raises(OffmoeError, match="mlx"):
        open_tiny(copy_of_tiny)


def test_a_config_that_begins_with_a_byte_order_mark(copy_of_tiny: Path) -> None:
    """simpletransformers#1169: JSONDecodeError; transformers does not read it either; the message says why."""
    path = copy_of_tiny / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    for command in ("inspect", "plan"):
        assert "begins with a byte order mark" in fail(command, copy_of_tiny)


# Quantised ----------------------------------------------------------------------------------------------------------


def test_layers_left_out_of_quantisation(tmp_path: Path) -> None:
    """https://github.com/vllm-project/vllm/pull/28878: experts of some layers in full, of others packed: KeyError."""
    scheme = Scheme(bits=4, group=32)
    save_compressed(tmp_path, "qwen3_moe", scheme)
    path = tmp_path / "model.safetensors"
    plain = decompressed_model(tmp_path, scheme)
    weights = plain.state_dict()
    packed = load_file(path)
    kept = {name: tensor for name, tensor in packed.items() if ".layers.2.mlp.experts" not in name}
    for expert in range(8):
        stem = f"model.layers.2.mlp.experts.{expert}"
        gate, up = weights["model.layers.2.mlp.experts.gate_up_proj"][expert].chunk(2)
        down = weights["model.layers.2.mlp.experts.down_proj"][expert]
        for name, matrix in (("gate", gate), ("up", up), ("down", down)):
            kept[f"{stem}.{name}_proj.weight"] = matrix.contiguous()
    save_file(kept, path, metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["ignore"].append("re:.*layers.2.mlp.experts.*")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with torch.inference_mode():
        same_logits(tmp_path, plain(IDS).logits)


def test_nvfp4_is_refused_by_name(copy_of_tiny: Path) -> None:
    """https://github.com/huggingface/transformers/issues/48371: decoded without their global scale, in silence."""
    weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
    group = {"weights": weights, "targets": ["Linear"], "format": "nvfp4-pack-quantized"}
    edit_json(
        copy_of_tiny / "config.json",
        quantization_config={
            "quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "config_groups": {"group_0": group},
            "ignore": ["lm_head"], "quantization_status": "compressed",
        },
    )  # fmt: skip
    for command in ("inspect", "plan"):
        assert "nvfp4" in fail(command, copy_of_tiny).lower()


# Positions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scaling",
    [
        {"type": "linear", "factor": 4.0},
        {"type": "dynamic", "factor": 2},
        {"type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 64},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attn_factor": 0.8782488562869419},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 64},
    ],
    ids=["linear by its old key", "dynamic", "whole numbers", "an unknown key", "llama3"],
)  # fmt: skip
def test_scaled_positions_as_configs_say_them(copy_of_tiny: Path, scaling: dict[str, Any]) -> None:
    """transformers#32167 (KeyError 'rope_type'), transformers#37134 (whole numbers), DeepSeek-R1#684 (attn_factor)."""
    edit_json(copy_of_tiny / "config.json", rope_parameters=None, rope_theta=10000.0, rope_scaling=scaling)
    same_logits(copy_of_tiny)


# Text ---------------------------------------------------------------------------------------------------------------


def test_a_token_added_beyond_the_embedding_is_refused(copy_of_tiny: Path) -> None:
    """https://github.com/arcee-ai/mergekit/issues/139: a merged model keeps 32,000 rows, its tokenizer has 32,007."""
    byte_tokenizer(copy_of_tiny, *(f"<extra_{idx}>" for idx in range(60)))
    with open_tiny(copy_of_tiny) as engine:
        assert engine.generate("ab", max_new_tokens=2, ignore_eos=True).token_ids
        with pytest.raises(OffmoeError) as caught:
            engine.generate("ab<extra_59>", max_new_tokens=2)
        assert "<extra_59>" in one_line(caught) and "128" in one_line(caught)


@pytest.mark.parametrize("ends", [[121], 121, [121, 122]])
def test_replies_end_at_every_end_that_is_declared(copy_of_tiny: Path, ends: object) -> None:
    """mlx-vlm#2112 (the tokenizer's end is not in generation_config), TensorRT-Model-Connect#640 (a list there)."""
    byte_tokenizer(copy_of_tiny, *(f"<s{idx}>" for idx in range(38)), eos="<s33>")  # <s33> is 123
    edit_json(copy_of_tiny / "config.json", eos_token_id=120)
    edit_json(copy_of_tiny / "generation_config.json", eos_token_id=ends)
    declared = {120, 123, *(ends if isinstance(ends, list) else [ends])}
    with open_tiny(copy_of_tiny) as engine:
        for end in sorted(declared):
            reply = engine.generate("ab", max_new_tokens=4, choose=always(engine, [5, 6, end, 7]))
            assert (list(reply.token_ids), reply.finish_reason) == ([5, 6], "stop"), end


def test_a_character_of_four_tokens_is_streamed_whole(copy_of_tiny: Path) -> None:
    """https://github.com/antonellof/ferrox/issues/124 and eight more: emoji become replacement characters."""
    byte_tokenizer(copy_of_tiny)
    smile = [86, 87, 88, 89]
    with open_tiny(copy_of_tiny) as engine:
        assert engine.tokenizer is not None and list(engine.tokenizer("\N{GRINNING FACE}")["input_ids"]) == smile
        pieces = list(engine.stream("ab", max_new_tokens=6, ignore_eos=True, choose=always(engine, [0, *smile, 1])))
    assert "".join(piece.text for piece in pieces) == '!\N{GRINNING FACE}"'
    assert not any("\N{REPLACEMENT CHARACTER}" in piece.text for piece in pieces)


# Chats --------------------------------------------------------------------------------------------------------------

TURNS = "{% for m in messages %}{{ '<s1>' + m.role + ':' + m.content + '<s2>' }}{% endfor %}{{ '<s1>a:' }}"


@pytest.fixture
def chatting(copy_of_tiny: Path) -> Iterator[Callable[[str], offmoe.Engine]]:
    opened = []

    def start(template: str) -> offmoe.Engine:
        marks = ("<think>", "</think>")
        byte_tokenizer(copy_of_tiny, *(f"<s{idx}>" for idx in range(36)), *marks, eos="<s33>", template=template)
        opened.append(open_tiny(copy_of_tiny))
        return opened[-1]

    yield start
    for engine in opened:
        engine.close()


def test_a_template_that_asks_for_the_date(chatting: Callable[[str], offmoe.Engine]) -> None:
    """https://github.com/huggingface/text-generation-inference/issues/2987: strftime_now is undefined."""
    engine = chatting("{{ strftime_now('%Y') }}" + TURNS)
    assert engine.chat([{"role": "user", "content": "hi"}], max_new_tokens=2, ignore_eos=True).token_ids


def test_a_template_that_refuses_a_conversation(chatting: Callable[[str], offmoe.Engine]) -> None:
    """llama.cpp#11402, mistral-vibe#1006: 'roles must alternate' as an internal error, and no way to go on after it."""
    refusal = "{% if messages|length > 1 %}{{ raise_exception('roles must alternate') }}{% endif %}"
    engine = chatting(refusal + TURNS)
    hello = {"role": "user", "content": "hi"}
    with pytest.raises(OffmoeError) as caught:
        engine.chat([hello, hello], max_new_tokens=2)
    assert "roles must alternate" in one_line(caught)
    assert engine.chat([hello], max_new_tokens=2, ignore_eos=True).token_ids, "the engine goes on"


@pytest.mark.parametrize(
    ("ending", "written", "parts"),
    [
        ("<think>", "hm</think>4", [(True, "hm"), (False, "4")]),
        ("<think></think>", "4", [(False, "4")]),
        ("", "<think>hm</think>4", [(True, "hm"), (False, "4")]),
        ("", "4", [(False, "4")]),
    ],
    ids=["opened by the prompt", "closed by the prompt", "by the model", "none"],
)
def test_reasoning_is_told_from_the_answer(
    chatting: Callable[[str], offmoe.Engine], ending: str, written: str, parts: list[tuple[bool, str]]
) -> None:
    """Kai#301 (the prompt opened the block), vllm#53284 (the prompt closed it), mlx-community's many more."""
    engine = chatting(TURNS + "{{ '" + ending + "' }}")
    assert engine.tokenizer is not None
    ids = list(engine.tokenizer(written, add_special_tokens=False)["input_ids"])
    found: list[tuple[bool, str]] = []
    for piece in engine.stream_chat(
        [{"role": "user", "content": "2+2"}], max_new_tokens=len(ids), ignore_eos=True, choose=always(engine, ids)
    ):
        if found and found[-1][0] == piece.reasoning:
            found[-1] = (piece.reasoning, found[-1][1] + piece.text)
        elif piece.text:
            found.append((piece.reasoning, piece.text))
    assert found == parts


# Commands -----------------------------------------------------------------------------------------------------------


def test_a_folder_whose_name_has_spaces_and_letters(tiny: Path, tmp_path: Path) -> None:
    """llama.cpp#5802, ollama#3120, koboldcpp#519: a path that is not all ASCII is not opened."""
    folder = Path(shutil.copytree(tiny, tmp_path / "mein Modell — 模型"))
    assert last_json(succeed("inspect", folder, "--json").stdout)
    same_logits(folder)
