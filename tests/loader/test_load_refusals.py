"""Models and options that are refused though nothing is damaged: not a model, not an MoE, not allowed, not enough."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers
from damage import refuse, set_config
from engines import open_tiny, save_tiny

import offmoe
from offmoe.core.errors import (
    BudgetError,
    CheckpointError,
    HubUnreachableError,
    ModelNotFoundError,
    UnsupportedModelError,
    UsageError,
)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that nobody writes to."""
    return save_tiny(tmp_path_factory.mktemp("good"))


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(good, tmp_path / "model"))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model_type": "qwen9_moe"}, ("'qwen9_moe'", "nearest that offmoe runs: qwen3_moe")),
        ({"model_type": "zzz"}, ("'zzz'", "offmoe runs mixtral")),
        ({"model_type": "soft_moe"}, ("'soft_moe' is soft MoE", "token by token")),
        ({"architectures": ["SoftMoEForCausalLM"]}, ("'SoftMoEForCausalLM' is soft MoE", "mixtral")),
        ({"router_type": "expert_choice"}, ("'expert_choice' is expert choice", "tokens that come after it")),
        ({"quantization_config": {"quant_method": "gptq"}}, ("quantised", "gptq", "offmoe quantize")),
    ],
)
def test_architectures_and_formats_that_are_not_run(
    folder: Path, values: dict[str, Any], words: tuple[str, ...]
) -> None:
    set_config(**values)(folder)
    refuse(folder, UnsupportedModelError, *words)


@pytest.mark.parametrize("name", ["/no/such/folder", "no-such-folder", "~/no/such folder"])
def test_no_such_folder(name: str) -> None:
    refuse(name, ModelNotFoundError, name, "does not exist", "hub id like")


def test_a_file_is_no_folder(good: Path, tmp_path: Path) -> None:
    refuse(good / "model.safetensors", ModelNotFoundError, "is a file", "model's folder")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    refuse(tmp_path / "model.gguf", CheckpointError, "GGUF", "download it again")


def test_a_hub_that_is_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """More of the hub is in test_hub.py."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    refuse("some/model", HubUnreachableError, "no folder some/model", "out of reach", "check the network")


TINY_DENSE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 64,
}  # fmt: skip


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_a_dense_model_is_told_what_to_use(family: str, tmp_path: Path) -> None:
    config = getattr(transformers, f"{family}Config")(**TINY_DENSE)
    getattr(transformers, f"{family}ForCausalLM")._from_config(config).save_pretrained(tmp_path)
    refuse(
        tmp_path,
        UnsupportedModelError,
        f"{family}ForCausalLM is a dense model",
        "no experts",
        "transformers or llama.cpp",
    )


def test_a_model_that_writes_no_text(tmp_path: Path) -> None:
    config = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.CLIPVisionModel._from_config(config).save_pretrained(tmp_path)
    refuse(tmp_path, UnsupportedModelError, "'clip_vision_model'", "no text generation model")


def test_experts_that_nothing_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offmoe.loader.build.adapt_experts", lambda model: None)
    dbrx = transformers.DbrxConfig(
        d_model=32, n_heads=2, n_layers=2, vocab_size=64, attn_config={"kv_n_heads": 2, "rope_theta": 1e4},
        ffn_config={"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    )  # fmt: skip
    transformers.DbrxForCausalLM._from_config(dbrx).save_pretrained(tmp_path)
    refuse(tmp_path, UnsupportedModelError, "dbrx", "where offmoe cannot serve them", "offmoe runs", "docs/models.md")


class _Bomb:
    """Unpickling this would write a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_a_pickle_is_never_opened(folder: Path, tmp_path: Path, name: str) -> None:
    marker = tmp_path / "exploded"
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(_Bomb(marker)))
    refuse(folder, UnsupportedModelError, name, "pickle", "safetensors version")
    assert not marker.exists()
    pickle.loads((folder / name).read_bytes())
    assert marker.exists(), "the bomb is a real one"


BOMB = "from pathlib import Path\nPath({marker!r}).touch()\n"


@pytest.mark.parametrize("part", ["config", "model", "tokenizer"])
def test_code_in_the_folder_is_never_run_unasked(folder: Path, tmp_path: Path, part: str) -> None:
    marker = tmp_path / "exploded"
    (folder / "mine.py").write_text(BOMB.format(marker=str(marker)))
    if part == "tokenizer":
        text = json.dumps({"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}})
        (folder / "tokenizer_config.json").write_text(text)
        refuse(folder, UnsupportedModelError, "tokenizer", "its own Python code", "--trust-remote-code")
    elif part == "config":
        set_config(model_type="mine", auto_map={"AutoConfig": "mine.Mine"})(folder)
        refuse(folder, UnsupportedModelError, "'mine'", "its own Python code", "--trust-remote-code")
    else:  # a known architecture that also offers code: transformers' own class is used
        set_config(auto_map={"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Mine"})(folder)
        with open_tiny(folder) as engine:
            assert type(engine.model).__module__.startswith("transformers.")
    assert not marker.exists()


def test_code_in_the_folder_is_run_when_asked(folder: Path, tmp_path: Path) -> None:
    """The marker of the tests above is a working one."""
    marker = tmp_path / "exploded"
    (folder / "mine.py").write_text(BOMB.format(marker=str(marker)))
    set_config(model_type="mine", auto_map={"AutoConfig": "mine.Mine"})(folder)
    refuse(folder, CheckpointError, "config.json", "mine", trust_remote_code=True)
    assert marker.exists()


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("ram", "lots", ('write it like "6GiB"',)), ("ram", 1.5, ("1.5",)), ("ram", -1, ("negative",)),
        ("context_length", 999, ("999", "made for 256", "--context-length 256")),
        ("context_length", 0, ("whole number of at least 1",)), ("context_length", "long", ("whole number",)),
        ("expert_slots", 2.5, ("whole number",)), ("prefill_chunk", -4, ("whole number",)),
        ("policy", "random", ("known: auto, lru",)), ("io", "fast", ("known: auto, direct, buffered",)),
        ("device", "abacus", ("known: auto, cpu, cuda, cuda:N",)), ("trust_remote_code", "yes", ("True or False",)),
    ],
)  # fmt: skip
def test_option_values_name_what_is_accepted(good: Path, option: str, value: object, words: tuple[str, ...]) -> None:
    refuse(good, UsageError, f"{option} is ", *words, **{option: value})


def test_direct_reads_where_there_are_none(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offmoe.checkpoint.shard_file.ShardFile.open_direct", lambda file: False)
    refuse(good, UsageError, "without direct reads", "--io buffered", io="direct")
    with open_tiny(good) as engine:
        assert engine.stats()["io"] == "buffered"


def test_fewer_slots_than_one_token_needs(good: Path) -> None:
    refuse(good, BudgetError, "expert_slots is 1", "needs 2", "--expert-slots 2", expert_slots=1)
    with open_tiny(good, expert_slots=2) as engine:
        assert engine.generate([5, 6, 7], max_new_tokens=2).token_ids


def advised(text: str, flag: str) -> int:
    """The number behind `flag` in an error message."""
    return int(text.partition(f"{flag} ")[2].split()[0].removesuffix("MiB").rstrip(";,"))


@pytest.mark.parametrize("ram", [0, 1 << 20, "40MiB"])
@pytest.mark.parametrize("context_length", [16, 256])
def test_the_budget_that_is_advised_works(good: Path, ram: int | str, context_length: int) -> None:
    options: dict[str, Any] = {"context_length": context_length}
    text = refuse(good, BudgetError, "this model needs", "resident weights", ram=ram, **options)
    enough = advised(text, "--ram")
    assert f"needs {enough} MiB" in text
    with open_tiny(good, expert_slots=None, ram=f"{enough}MiB", **options) as engine:
        assert engine.generate([5, 6, 7], max_new_tokens=3).token_ids
        assert engine.plan.total_bytes <= enough << 20
    refuse(good, BudgetError, ram=f"{enough - 48}MiB", **options)


def test_the_number_of_experts_that_is_advised_works(tmp_path: Path) -> None:
    """Experts of 2 MiB, so that a few matter: for `--expert-slots` beyond the budget both ways out are named."""
    config = transformers.MixtralConfig(
        hidden_size=256, intermediate_size=704, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=64, num_local_experts=16, max_position_embeddings=64,
    )  # fmt: skip
    transformers.MixtralForCausalLM._from_config(config).save_pretrained(tmp_path)
    need = advised(refuse(tmp_path, BudgetError, ram="0MiB"), "--ram")
    text = refuse(tmp_path, BudgetError, "--expert-slots 32 needs", "room for", ram=f"{need + 16}MiB", expert_slots=32)
    fitting, enough = advised(text, "--expert-slots 32 needs"), advised(text, "or --ram")
    assert fitting == enough > need
    with offmoe.load(tmp_path, ram=f"{enough}MiB", expert_slots=32) as engine:
        assert engine.plan.num_slots == 32
    slots = advised(text.partition("use ")[2], "--expert-slots")
    with offmoe.load(tmp_path, ram=f"{need + 16}MiB", expert_slots=slots - 2) as engine:
        assert 2 <= engine.plan.num_slots == slots - 2
