"""Predicted speed: the arithmetic of a token, what a family's layers cost, and that a plan is held to its run."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
from families import FAMILIES, build

import offmoe
from offmoe.checkpoint.locate import demo_model_folder
from offmoe.decode.families.common import spec_of
from offmoe.decode.spec import NoSpecError
from offmoe.machine.record import DriveSpeed, LayerCosts, MachineRecord, drive_key, write_record
from offmoe.memory.budget import MemoryPlan
from offmoe.planner.hit_rates import HitCurve
from offmoe.planner.layer_costs import WHOLE, latent_work, layer_cost
from offmoe.planner.make_plan import against_plan
from offmoe.planner.model_facts import ModelFacts, read_facts
from offmoe.planner.predict import SpeedPrediction, SpeedStep, predict

SMALL = LayerCosts(whole_s=1e-5, whole_token_s=3e-4, modules_s=2e-4, token_s=4e-4, watched_s=1e-5, fetch_s=5e-5)
COSTS = LayerCosts(whole_s=1e-4, whole_token_s=1e-3, modules_s=5e-4, token_s=2e-3, watched_s=5e-5, fetch_s=2e-4)
RECORD = MachineRecord(
    name="a machine", ram_bytes=1 << 34, num_cores=4, read_bytes_per_s=4e10,
    cpu_bytes_per_s={"bf16": 2e10, "bf16 turned": 5e9, "bf16 turned, off lines": 4e9, "int4": 1e10},
    cpu_flops_per_s=1e11, latent_flops_per_s=5e10, latent_bytes_per_s=8e9, cached_bytes_per_s=6e10,
    cache_bytes=1 << 20, layers=COSTS, cached_layers=SMALL,
    libraries_bytes=1 << 28,
)  # fmt: skip
DRIVE = DriveSpeed(direct_bytes_per_s=2e9, buffered_bytes_per_s=1e9)


@pytest.fixture(scope="module")
def demo() -> ModelFacts:
    return read_facts(demo_model_folder(), direct=True)


def predicted(
    facts: ModelFacts, record: MachineRecord = RECORD, *, hits: float = 1.0, num_slots: int | None = None
) -> SpeedPrediction:
    plan = MemoryPlan(
        ram_bytes=1 << 33, runtime_bytes=0, resident_bytes=0, kv_bytes=8_000_000, workspace_bytes=0,
        slot_bytes=facts.sizes.slot_bytes, num_slots=num_slots or facts.sizes.num_experts,
        num_experts=facts.sizes.num_experts, prefill_chunk=64,
    )  # fmt: skip
    curve = HitCurve(at=lambda _: hits, source="told")
    return predict(
        facts, plan, record, curve, drive=DRIVE, direct=True, prompt_tokens=64, context_length=1000
    )  # fmt: skip


def steps_of(found: SpeedPrediction) -> dict[str, SpeedStep]:
    return {step.what: step for step in found.decode_steps}


def test_a_token_is_the_sum_of_its_steps(demo: ModelFacts) -> None:
    found = predicted(demo)
    seconds = demo.dense_bytes / 2e10 + demo.routed_bytes / 2e10 + 4e6 / 4e10 + demo.num_layers * 1e-4 + 1e-3
    assert 1 / found.decode_tok_per_s == pytest.approx(seconds)
    assert not any("missing" in name for name in steps_of(found))


def test_a_model_that_caches_hold_is_read_faster(demo: ModelFacts) -> None:
    found = predicted(demo, replace(RECORD, cache_bytes=64 << 20))
    seconds = (demo.dense_bytes + demo.routed_bytes) / 6e10 + 4e6 / 4e10 + demo.num_layers * 1e-5 + 3e-4
    assert 1 / found.decode_tok_per_s == pytest.approx(seconds)


def test_missing_experts_wait_for_the_drive_less_what_is_computed_meanwhile(demo: ModelFacts) -> None:
    """By brute force over which of a layer's experts are missing."""
    hits, top_k = 0.7, demo.sizes.top_k
    found = predicted(demo, hits=hits, num_slots=demo.sizes.num_experts // 2)
    waited = 0.0
    for pattern in range(2**top_k):
        missed = pattern.bit_count()
        chance = (1 - hits) ** missed * hits ** (top_k - missed)
        if missed:
            reading = COSTS.fetch_s + missed * demo.expert_bytes / 2e9
            waited += chance * max(0.0, reading - (top_k - missed) * demo.expert_bytes / 2e10)
    more = 1 / found.decode_tok_per_s - 1 / predicted(demo).decode_tok_per_s
    assert more == pytest.approx(demo.num_moe_layers * (waited + COSTS.watched_s))
    assert steps_of(found)["of that, while others are computed"].seconds < 0


def test_the_form_of_the_experts_counts(demo: ModelFacts) -> None:
    turned = replace(demo, expert_kind="bf16 turned", is_off_lines=False)
    assert steps_of(predicted(turned))["experts (bf16 turned)"].rate == 5e9
    half = demo.sizes.num_experts // 2
    assert steps_of(predicted(turned, num_slots=half))["experts (bf16 turned)"].rate == 5e9
    off_lines = replace(turned, is_off_lines=True)
    assert steps_of(predicted(off_lines, num_slots=half))["experts (bf16 turned)"].rate == 4e9
    assert steps_of(predicted(off_lines))["experts (bf16 turned)"].rate == 5e9, "with room for all they are moved"
    assert steps_of(predicted(replace(demo, expert_kind="int4")))["experts (int4)"].rate == 1e10


def test_latent_attention_computes_with_the_whole_context(demo: ModelFacts) -> None:
    config = {
        "kv_lora_rank": 512, "num_attention_heads": 16, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128,
        "v_head_dim": 128, "num_hidden_layers": 3,
    }  # fmt: skip
    scores, results = 512 + 64, 512
    assert latent_work(config, 500) == (2 * 3 * 500 * 16 * (scores + results), 3 * 16 * 512 * 256)
    assert latent_work({**config, "kv_lora_rank": None}, 500) == latent_work({}, 500) == (0, 0)
    found = steps_of(predicted(replace(demo, config=config)))
    assert found["attention to latents"].seconds == pytest.approx(latent_work(config, 500)[0] / 5e10)
    assert found["between heads and latents"].seconds == pytest.approx(3 * 16 * 512 * 256 * 2 / 8e9)


def test_costs_by_family() -> None:
    assert layer_cost("qwen3_moe", COSTS) == (1e-4, 1e-3)
    assert layer_cost("dbrx", COSTS) == layer_cost("a new one", COSTS) == (5e-4, 2e-3)
    plain, long, longest = (layer_cost(name, COSTS)[0] for name in ("dbrx", "jamba", "zaya"))
    assert plain < long == layer_cost("deepseek_v32", COSTS)[0] < longest


def test_the_loader_fuses_the_same_families() -> None:
    for name in FAMILIES:
        config = build(name).config
        try:
            spec_of(config.get_text_config())
        except NoSpecError:
            assert config.model_type not in WHOLE, name
        else:
            assert {config.model_type, config.get_text_config().model_type} & WHOLE, name


@pytest.fixture
def probed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MachineRecord:
    monkeypatch.setenv("OFFMOE_CACHE", str(tmp_path / "cache"))
    record = replace(RECORD, drives={drive_key(demo_model_folder()): DRIVE})
    assert write_record(record) is None
    return record


def test_load_says_the_plan_and_what_came_of_it(
    probed: MachineRecord, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    said: list[str] = []
    with offmoe.load(expert_slots=48, device="cpu", context_length=128, tell=said.append) as engine:
        (line,) = said
        assert line.startswith("plan: 48 of 192 experts in RAM") and " tok/s, first token of" in line
        engine.generate([3, 4, 5, 6], max_new_tokens=3, ignore_eos=True)
        totals = engine.stats()
    assert said[1:] == [against_plan(totals)]
    foreseen = totals["predicted"]
    assert said[1].startswith(f"plan: predicted {foreseen['decode_tok_per_s']:.1f} tok/s, measured ")
    assert f"{totals['decode_tok_per_s']:.1f};" in said[1] and "hits " in said[1] and "; peak " in said[1]
    with caplog.at_level(logging.INFO, "offmoe"), offmoe.load(expert_slots=48, device="cpu", context_length=128):
        pass  # nothing was decoded: there is nothing to hold the plan to
    (record,) = [record for record in caplog.records if record.name.startswith("offmoe")]
    assert record.levelno == logging.INFO and record.getMessage().startswith("plan: 48 of 192 experts in RAM")
    assert capsys.readouterr() == ("", "")


def test_what_the_device_held_is_said_beside_its_plan() -> None:
    totals = {
        "predicted": {"peak_bytes": 3 << 30, "hit_rate": 0.5, "decode_tok_per_s": 10.0}, "decoded_tokens": 4,
        "decode_tok_per_s": 9.0, "peak_rss_growth_bytes": 2 << 30, "decode_hit_rate": 0.25,
    }  # fmt: skip
    on_cpu = against_plan(totals)
    assert on_cpu is not None and "device" not in on_cpu
    not_counted = {**totals, "device_planned_bytes": 6 << 30, "device_peak_bytes": None}
    assert against_plan(not_counted) == on_cpu
    on_device = against_plan({**not_counted, "device_peak_bytes": 5 << 30})
    assert on_device == on_cpu + "; on the device 6.00 GiB, its driver counted, measured 5.00 GiB"


def test_a_machine_that_was_not_probed_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFMOE_CACHE", str(tmp_path))
    said: list[str] = []
    with offmoe.load(expert_slots=48, device="cpu", context_length=128, tell=said.append) as engine:
        engine.generate([3, 4, 5, 6], max_new_tokens=2, ignore_eos=True)
        assert "predicted" not in engine.stats() and against_plan(engine.stats()) is None
    assert not said
