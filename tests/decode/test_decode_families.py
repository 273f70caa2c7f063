"""The way of a token in every family: which are fused, that logits are transformers' own, and wrong specs are seen."""

from __future__ import annotations

from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted_families import ADAPTED, build_adapted
from cpu_cases import needs_library
from engines import PROMPT, open_tiny
from families import FAMILIES, build, save_layout
from logs import logs_warning
from test_grok1 import make_checkpoint
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridRMSNormGated

import offmoe
from offmoe.core.errors import NonFiniteError
from offmoe.decode.families import common as specs
from offmoe.decode.families.common import spec_of
from offmoe.decode.families.left_out import LEFT_OUT
from offmoe.decode.spec import DecoderSpec, NoSpecError
from offmoe.sampling.sampler import greedy

NUM_NEW = 12
VOCABULARY = 96  # the smallest
# Names in tests/families/families.py of the text models with a spec. A family that is taken off here is slower than
# before.
FUSED = {
    "afmoe", "aria", "axk1", "cohere2_moe", "deepseek_ocr2", "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe",
    "exaone_moe", "flex_olmo", "flint", "gemma4", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "gpt_oss", "granitemoe",
    "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "hunyuan_v1_moe", "hy_v3", "kolibri1", "laguna",
    "lfm2_moe", "mellum", "mimo_v2_flash", "minimax_m2", "mistral4", "mixtral", "nemotron_h", "olmoe", "phimoe",
    "qwen2_moe", "qwen3_5_moe", "qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_vl_moe", "solar_open",
}  # fmt: skip
GROWING = {
    **FAMILIES["mistral4"].config["rope_parameters"], "original_max_position_embeddings": 11,  # type: ignore[dict-item]
}  # fmt: skip
# Older transformers (5.20) norm all groups of a Mamba mixer together: with several, the family goes by its modules.
MAMBA_GROUPS = 2 if "group_size" in signature(GraniteMoeHybridRMSNormGated.__init__).parameters else 1
# Forms of a family that are published and that the tiny model is not, and grok-1, which is offmoe's own class.
VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    "gemma4 without a value projection": (
        "gemma4", {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "hidden_size_per_layer_input": 0},
    ),
    "cohere2_moe, layer norms, average": (
        "cohere2_moe", {"rms_norm_eps": None, "shared_expert_combination_strategy": "average"},
    ),
    "cohere2_moe, softmax": ("cohere2_moe", {"expert_selection_fn": "softmax"}),
    "grok-1": ("grok-1", {}),
    "granitemoehybrid without angles": (
        "granitemoehybrid", {"position_embedding_type": "nope", "mamba_n_groups": MAMBA_GROUPS},
    ),
    "nemotron_h, experts as wide as the model": ("nemotron_h", {"moe_latent_size": None}),
    "step3p7": ("step3p7", {}),
    # Queries grow at the second token of the reply.
    "mistral4, far": ("mistral4", {"rope_parameters": GROWING}),
}  # fmt: skip
MODELS = {**{name: (name, {}) for name in FUSED}, **VARIANTS}

pytestmark = needs_library


def save(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """The model of that name in MODELS."""
    family, overrides = MODELS[name]
    if family == "grok-1":
        make_checkpoint(folder, dtype)
    elif family in ADAPTED:
        build_adapted(family).to(dtype).save_pretrained(folder)
    else:
        save_layout(build(family, dtype=dtype, overrides=overrides), folder, "published")


def logits(
    engine: offmoe.Engine, num_new: int = NUM_NEW, *, prompt: list[int] | None = None, **options: Any
) -> torch.Tensor:
    """Logits of every greedy step, (N, V)."""
    rows: list[torch.Tensor] = []

    def choose(_: torch.Tensor, last: torch.Tensor) -> int:
        rows.append(last.clone())
        return int(last.argmax())

    prompt = [token % VOCABULARY for token in prompt or PROMPT]
    engine.generate(prompt, max_new_tokens=num_new, choose=choose, ignore_eos=True, **options)
    return torch.cat(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_the_logits_are_those_of_the_modules(
    name: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past windows, with experts that are missing; the tokens that were compared come again to the bit."""
    save(name, tmp_path, dtype)
    with open_tiny(tmp_path, compile="off", expert_slots=9) as engine:
        first, again = logits(engine), logits(engine)
        stats = engine.stats()
        assert (stats["decode_path"], stats["decode_path_reason"]) == ("fused", "")
        assert stats["misses"] > 0
        # In 16 bits a router that nearly ties may decide one of the compared tokens otherwise.
        assert torch.equal(first if dtype is torch.float32 else logits(engine), again)
    if dtype is torch.float32:
        monkeypatch.setenv("OFFMOE_DECODE", "eager")  # exact itself: tests/families/test_families_exact.py
        with open_tiny(tmp_path, compile="off") as engine:
            wanted = logits(engine)
            assert engine.stats()["decode_path"] == "eager"
        assert (first - wanted).abs().max() < 5e-5 * wanted.abs().max()


def test_which_families_have_a_spec() -> None:
    found = set()
    for name in FAMILIES:
        config = build(name).config.get_text_config()
        try:
            spec_of(config)
            found.add(name)
        except NoSpecError as error:
            assert str(error) == f"no spec for {config.model_type}: {LEFT_OUT[config.model_type]}"
    assert found == FUSED
    assert not LEFT_OUT.keys() & specs.FAMILIES.keys()


@pytest.mark.parametrize("name", ["lfm2_moe", "qwen3_next", "granitemoehybrid", "nemotron_h"])
def test_running_states_after_an_edited_prompt(name: str, tmp_path: Path) -> None:
    """They cannot go back: what the cache holds of another prompt is not mixed in."""
    save(name, tmp_path)
    edited = [*PROMPT[:4], 60, *PROMPT[5:]]
    with open_tiny(tmp_path, compile="off", expert_slots=9) as engine:
        first, second = logits(engine), logits(engine, prompt=edited)
        assert torch.equal(logits(engine), first) and torch.equal(logits(engine, prompt=edited), second)
        assert engine.stats()["decode_path"] == "fused"
        assert not torch.equal(first, second)
    with open_tiny(tmp_path, compile="off", expert_slots=9) as engine:
        assert (logits(engine, prompt=edited) - second).abs().max() < 5e-5 * second.abs().max()


def test_gemma4_whose_layers_share_keys(tmp_path: Path) -> None:
    save_layout(build("gemma4", overrides={"num_kv_shared_layers": 1}), tmp_path, "published")
    with open_tiny(tmp_path, compile="off") as engine:
        logits(engine)
        stats = engine.stats()
    assert (stats["decode_path"], stats["decode_path_reason"]) == ("eager", "layers share keys and values")


def test_logits_that_are_no_numbers_are_not_laid_to_the_spec(tmp_path: Path) -> None:
    model = build("qwen3_moe")
    with torch.no_grad():  # of one id's row alone, which the greedy reply comes to
        model.get_input_embeddings().weight[5] = float("nan")
    save_layout(model, tmp_path, "published")
    with open_tiny(tmp_path, compile="off") as engine:
        for _ in range(4):
            with pytest.raises(NonFiniteError):
                engine.generate(PROMPT, max_new_tokens=4, choose=stubborn, ignore_eos=True)
        logits(engine)
        assert engine.stats()["decode_path"] == "fused"


def stubborn(ids: torch.Tensor, last: torch.Tensor) -> int:
    """Id 5, as long as there is anything to choose from."""
    greedy(ids, last)
    return 5


def with_other_norms(spec: DecoderSpec) -> DecoderSpec:
    """The spec, but for how norms multiply."""
    return replace(spec, norm_kind="weight_last" if spec.norm_kind == "one_plus_weight" else "one_plus_weight")


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_wrong_spec_is_seen_in_the_first_tokens(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(name, tmp_path)
    right = specs.spec_of
    with monkeypatch.context() as patch:
        patch.setenv("OFFMOE_DECODE", "eager")
        with open_tiny(tmp_path, compile="off") as engine:
            wanted = logits(engine)
            assert engine.stats()["decode_path"] == "eager"
    monkeypatch.setattr("offmoe.decode.paths.spec_of", lambda config: with_other_norms(right(config)))
    with open_tiny(tmp_path, compile="off") as engine:
        with logs_warning(r"goes through transformers' modules: on the fused path logits differ"):
            found = logits(engine)
        stats = engine.stats()
        assert stats["decode_path"] == "eager" and stats["decode_path_reason"].startswith("logits differ by ")
        assert "allowed 1e-04" in stats["decode_path_reason"]
        assert (found - wanted).abs().max() < 2e-5 * wanted.abs().max()
        assert torch.equal(logits(engine), logits(engine))
