"""What generating cost: the line for people, the record for programs, and the totals since load."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
from engines import PROMPT, open_tiny, save_tiny

from offmoe.core.counters import Counters
from offmoe.engine.engine_stats import EngineStats
from offmoe.engine.stats import GenerationStats, Totals, stats_line
from offmoe.tiers.device import SimulatedDevice


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def stats_of(decode: Counters, steps: int = 2) -> GenerationStats:
    return GenerationStats(
        prompt_tokens=8, new_tokens=steps + 1, prefill_s=0.5, step_s=(0.1,) * steps, prefill=Counters(), decode=decode
    )


def test_the_line_says_what_became_of_prefetches() -> None:
    plain = stats_of(Counters(hits=3, misses=1, disk_bytes=4_000_000, disk_stall_ns=5_000_000))
    assert (
        stats_line(plain)
        == plain.line()
        == (
            "3 tokens, 10.0 tok/s | first token 0.50 s for 8 prompt tokens | hits 75.0% | "
            "disk 2.0 MB/token, 2.5 ms stall, 0.0 kB for the prompt"
        )
    )
    ahead = stats_of(Counters(ahead_bytes=4_000_000, ahead_used_bytes=3_000_000, ahead_wasted_bytes=500_000))
    assert stats_line(ahead).endswith(" | prefetch 2.0 MB/token, 75% useful, 12% wasted")
    record = ahead.as_dict()
    assert (record["prefetch_useful"], record["prefetch_wasted"], record["ahead_bytes_per_token"]) == (0.75, 0.125, 2e6)
    assert plain.as_dict()["prefetch_useful"] is None
    nothing = stats_of(Counters(), steps=0)
    assert (
        stats_line(nothing).startswith("1 tokens, - | first token") and nothing.as_dict()["disk_bytes_per_token"] == 0
    )


def test_a_speed_is_tokens_over_the_seconds_they_took() -> None:
    """Of a reply and of all replies alike: with one slow token, one over the median would be another number."""
    stats = dataclasses.replace(stats_of(Counters()), step_s=(0.1, 0.1, 0.1, 0.7))
    totals = Totals()
    totals.add(stats)
    assert stats.decode_tok_per_s == pytest.approx(4.0)
    assert totals.as_dict()["decode_tok_per_s"] == stats.as_dict()["decode_tok_per_s"] == 4.0
    assert "4.0 tok/s" in stats.line()


def test_totals_add_up() -> None:
    totals = Totals()
    assert totals.as_dict()["decode_tok_per_s"] == 0.0
    totals.add(stats_of(Counters(hits=1, misses=1, disk_bytes=100), steps=2))
    totals.add(stats_of(Counters(hits=5, misses=1, disk_bytes=200), steps=1))
    record = totals.as_dict()
    assert record["decoded_tokens"] == 3 and record["decode_tok_per_s"] == pytest.approx(10)
    assert (record["decode_hit_rate"], record["disk_bytes_per_token"]) == (0.75, 100)


def test_an_engine_counts_every_reply_also_those_broken_off(tiny: Path) -> None:
    with open_tiny(tiny) as engine:
        first = engine.generate(PROMPT, max_new_tokens=4)
        pieces = engine.stream(PROMPT, max_new_tokens=8)
        for _ in range(3):
            next(pieces)
        pieces.close()
        stats = engine.stats()
    assert len(first.stats.step_s) == 3
    assert stats["decoded_tokens"] == 3 + 2
    assert stats["decode_tok_per_s"] > 0 and stats["disk_bytes_per_token"] > 0
    assert stats["disk_stall_ns"] > 0 and stats["link_stall_ns"] == stats["link_bytes_per_token"] == 0
    assert re.search(
        r"\| disk [\d.]+ kB/token, [\d.]+ ms stall, [\d.]+ kB for the prompt \| decode \w+", first.stats.line()
    )


def test_the_engines_statistics_are_a_record_and_a_mapping(tmp_path: Path) -> None:
    """Every counter by name; what only engines on a device have is there for those alone."""
    folder = save_tiny(tmp_path)
    counters, recorded = ({field.name for field in dataclasses.fields(kind)} for kind in (Counters, EngineStats))
    assert counters <= recorded
    of_device = {"device", "device_slots", "vram_bytes", "device_planned_bytes", "device_peak_bytes"}
    for simulated in (None, SimulatedDevice(1e12)):
        with open_tiny(folder, simulated=simulated) as engine:
            engine.generate(PROMPT, max_new_tokens=3, ignore_eos=True)
            stats = engine.stats()
        assert dict(stats) == stats.as_dict() == json.loads(json.dumps(stats.as_dict()))
        assert {name: stats[name] for name in stats} == {name: getattr(stats, name) for name in stats}
        assert len(stats) == len(list(stats)) and (stats.decoded_tokens, stats["decoded_tokens"]) == (2, 2)
        assert of_device & set(stats) == (set() if simulated is None else of_device)
        assert (stats.device, "predicted" in stats, stats.get("nothing")) == (simulated and "simulated", False, None)
        with pytest.raises(dataclasses.FrozenInstanceError):
            stats.hits = 0  # type: ignore[misc]
