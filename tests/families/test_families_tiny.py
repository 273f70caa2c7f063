"""The tiny models are what the other tests trust, so they are tested first: complete, alive, and saved as they say."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import families
import pytest
import torch
import transformers
from adapted_families import ADAPTED
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

ALL_NAMES = (*families.FAMILIES, *families.MULTIMODAL)

# Far above rounding (1e-6), far below what a changed expert does to these models (0.05 and more).
_VISIBLE = 1e-2


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Two threads only wait for each other on matrices this small: ten times slower on a busy machine."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def _prompt() -> torch.Tensor:
    return torch.randint(2, 120, (2, 12), generator=torch.Generator().manual_seed(1))


def _logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    assert isinstance(logits, torch.Tensor)
    return logits


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def _busiest_experts(model: PreTrainedModel, ids: torch.Tensor) -> dict[str, int]:
    """Experts module -> the expert that most tokens of one forward were routed to, for the modules that ran."""
    busiest: dict[str, int] = {}
    hooks = []
    for name, module in families.expert_modules(model):

        def note(_: nn.Module, args: tuple[torch.Tensor, ...], name: str = name) -> None:
            _x_TD, expert_ids_TK, weights_TK = args
            assert expert_ids_TK.shape == weights_TK.shape
            busiest[name] = Counter(expert_ids_TK.flatten().tolist()).most_common(1)[0][0]

        hooks.append(module.register_forward_pre_hook(note))
    _logits(model, ids)
    for hook in hooks:
        hook.remove()
    return busiest


def _stored_shapes(folder: Path) -> dict[str, list[int]]:
    shapes: dict[str, list[int]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            shapes.update({key: tensors.get_slice(key).get_shape() for key in tensors.keys()})  # noqa: SIM118
    return shapes


_MODELS = Path(transformers.__file__).parent / "models"
_COUNTS_EXPERTS = re.compile(r"num_experts|num_local_experts|n_routed_experts|moe_intermediate|moe_num_experts")


def _folders(kind: str, pattern: re.Pattern[str]) -> set[str]:
    """transformers' model folders with a match of `pattern` in a file of this kind."""
    files = _MODELS.glob(f"*/{kind}_*.py")
    return {file.parent.name for file in files if pattern.search(file.read_text(encoding="utf-8"))}


# New in transformers 5.24 and not tried: docs/limits.md says so.
_UNTRIED = {"hy_v4_vl", "inkling2_loop", "lara_mini", "sarvam_mla", "sarvam_moe"}

of_this_version = pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23), reason="the tables are those of 5.23"
)


@of_this_version
def test_every_family_with_the_experts_door_is_here_or_excluded_with_a_reason() -> None:
    decorated = _folders("modeling", re.compile(r"^@use_experts_implementation", re.MULTILINE))
    known = families.FAMILIES.keys() | families.EXCLUDED.keys() | _UNTRIED
    gone = families.FAMILIES.keys() - decorated  # those left out may have experts elsewhere
    assert decorated <= known and not gone, f"new: {sorted(decorated - known)}, gone: {sorted(gone)}"
    assert not families.FAMILIES.keys() & families.EXCLUDED.keys()


@of_this_version
def test_every_folder_whose_config_counts_experts_is_run_or_excluded_with_a_reason() -> None:
    """74 of them in transformers 5.23."""
    counted = _folders("configuration", _COUNTS_EXPERTS)
    run = {family.name for part in (families.FAMILIES, families.MULTIMODAL, ADAPTED) for family in part.values()}
    assert not run & (families.EXCLUDED.keys() | _UNTRIED)
    known = run | families.EXCLUDED.keys() | _UNTRIED
    assert counted <= known, f"new: {sorted(counted - known)}"
    assert len(counted & run) >= 70, f"{len(counted)=}"


@pytest.mark.parametrize("name", ALL_NAMES)
def test_logits_depend_on_the_experts_of_every_layer(name: str) -> None:
    model = families.build(name)
    ids = _prompt()
    logits = _logits(model, ids)
    assert torch.isfinite(logits).all()
    assert logits.std(dim=1).mean() > _VISIBLE, "logits do not depend on the token"
    busiest = _busiest_experts(model, ids)
    assert len(busiest) >= 2, f"{busiest=}"
    for module_name, expert in busiest.items():
        down = model.get_parameter(f"{module_name}.down_proj").detach()
        kept = down[expert].clone()
        down[expert] = down[(expert + 1) % len(down)]
        assert _relative(_logits(model, ids), logits) > _VISIBLE, f"{module_name} expert {expert} does not matter"
        down[expert] = kept


@pytest.mark.parametrize("name", ALL_NAMES)
def test_generates_to_the_end_with_a_cache(name: str) -> None:
    model = families.build(name)
    prompt = _prompt()[:1]
    ids = model.generate(prompt, max_new_tokens=32, do_sample=False)
    assert ids.shape == (1, prompt.shape[1] + 32)
    assert len(set(ids[0, prompt.shape[1] :].tolist())) >= 5, "the model repeats itself, which hides wrong ids"


@pytest.mark.parametrize("name", ALL_NAMES)
def test_published_checkpoint_loads_back(name: str, tmp_path: Path) -> None:
    model = families.build(name)
    families.save_layout(model, tmp_path, "published")
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="eager", experts_implementation="eager")
    # Not bit for bit: a parameter that is a view into the mapped file may be misaligned, and takes another kernel.
    assert _relative(_logits(loaded.eval(), _prompt()), _logits(model, _prompt())) < 1e-5


def test_the_same_seed_gives_the_same_weights_and_another_seed_others() -> None:
    first, again, other = (families.build("deepseek_v4", seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_other_dtypes_round_the_same_weights() -> None:
    whole, half = families.build("deepseek_v3"), families.build("deepseek_v3", dtype=torch.bfloat16)
    weight = "model.layers.1.mlp.experts.down_proj"
    assert torch.equal(whole.get_parameter(weight).bfloat16(), half.get_parameter(weight))
    assert half.get_buffer("model.layers.1.mlp.gate.e_score_correction_bias").dtype == torch.float32


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3", "olmoe", "jamba", "minimax_m3_vl_multimodal"])
def test_published_holds_one_expert_a_tensor_and_stacked_all(name: str, tmp_path: Path) -> None:
    model = families.build(name)
    for layout, ranks in (("published", {2}), ("stacked", {3})):
        families.save_layout(model, tmp_path / layout, layout)  # type: ignore[arg-type]
        shapes = _stored_shapes(tmp_path / layout)
        found = {len(shape) for key, shape in shapes.items() if ".experts." in key}
        assert found == ranks, f"{layout}: {found=}"


@pytest.mark.parametrize("name", ["gpt_oss", "granitemoe", "aria", "mistral4", "gemma4"])
def test_some_families_publish_stacked_experts(name: str, tmp_path: Path) -> None:
    families.save_layout(families.build(name), tmp_path, "published")
    assert any(len(shape) == 3 and shape[0] == 8 for shape in _stored_shapes(tmp_path).values())


def test_qwen3_vl_moe_publishes_transposed_experts(tmp_path: Path) -> None:
    model = families.build("qwen3_vl_moe")
    families.save_layout(model, tmp_path, "published")
    (name, experts), *_ = families.expert_modules(model)
    num_experts, rows, columns = experts.get_parameter("gate_up_proj").shape
    assert _stored_shapes(tmp_path)[f"{name}.gate_up_proj"] == [num_experts, columns, rows]


def test_shards_are_many_with_an_index(tmp_path: Path) -> None:
    families.save_layout(families.build("mixtral"), tmp_path, "shards")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert len(list(tmp_path.glob("*.safetensors"))) > 8


def test_an_unknown_layout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown layout 'flat'; known: published, stacked, shards"):
        families.save_layout(families.build("mixtral"), tmp_path, "flat")  # type: ignore[arg-type]
