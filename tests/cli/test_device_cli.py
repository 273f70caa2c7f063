"""What the commands say of a device: a simulated one stands for CUDA."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import last_json, succeed
from engines import leaves_nothing, save_tiny

from offmoe.core.counters import Counters
from offmoe.engine.stats import GenerationStats
from offmoe.tiers import open_device as device_module
from offmoe.tiers.device import Device, SimulatedDevice

FLAGS = ("--device", "cuda", "--ram", "4GiB", "--vram", "64MiB", "--expert-slots", "4", "--miss", "stream")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def _simulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def open_device(name: str) -> Device | None:
        return SimulatedDevice(1e12) if name == "cuda" else None

    monkeypatch.setattr(device_module, "open_device", open_device)
    with leaves_nothing():
        yield


def test_bench_records_the_device(tiny: Path) -> None:
    record = last_json(succeed("bench", tiny, "--prefill", 8, "--decode", 4, *FLAGS).stdout)
    assert (record["device"], record["device_slots"], record["experts_cached"]) == ("simulated", 4, 4)
    assert record["device_planned_bytes"] <= record["vram_bytes"] == 64 << 20
    assert record["device_peak_bytes"] is None, "only torch's allocator for a device counts"
    assert record["link_bytes"] > 0 and record["link_bytes_per_token"] > 0
    assert (record["settings"]["device"], record["settings"]["vram"]) == ("cuda", 64 << 20)
    assert "device_slots" not in last_json(
        succeed("bench", tiny, "--prefill", 8, "--decode", 4, "--ram", "4GiB", "--expert-slots", "4").stdout
    )


def test_generate_says_where_everything_is() -> None:
    """The bundled model, which has a tokenizer."""
    flags = ("--device", "cuda", "--ram", "4GiB", "--vram", "256MiB", "--expert-slots", "48", "--miss", "stream")
    result = succeed("generate", "--prompt", "import os", "-v", "--max-new-tokens", 3, *flags)
    plan, stats, memory = result.stderr.splitlines()[-3:]
    assert "48 of 192 experts on the device" in plan and "vram 256.0 MiB" in plan
    assert " | link " in stats
    assert "; simulated: peak not counted, planned " in memory and memory.endswith("budget 256.0 MiB, 48 expert slots")
    result = succeed("generate", "--prompt", "import os", "--max-new-tokens", 3, "--json", *flags)
    engine = last_json(result.stdout)["engine"]
    assert (engine["device"], engine["device_slots"], engine["vram_bytes"]) == ("simulated", 48, 256 << 20)
    assert engine["link_stall_ns"] > 0 and engine["disk_stall_ns"] > 0
    assert engine["ram_hits"] + engine["ram_misses"] == engine["link_copies"]


def test_verify_goes_through_sizes_of_the_device(tiny: Path) -> None:
    flags = ("--device", "cuda", "--ram", "4GiB", "--vram", "64MiB", "--miss", "stream")
    record = last_json(succeed("verify", tiny, "--prompt", "x", "--max-new-tokens", 3, "--json", *flags).stdout)
    assert record["passed"] and [size["slots"] for size in record["sizes"]] == [2, 4, 16]


def stats_of(decode: Counters, prefill: Counters | None = None) -> GenerationStats:
    return GenerationStats(
        prompt_tokens=8, new_tokens=3, prefill_s=0.5, step_s=(0.1, 0.1), prefill=prefill or Counters(), decode=decode
    )


def test_the_link_is_in_the_line_where_there_is_one() -> None:
    plain = stats_of(Counters(hits=3, misses=1, disk_bytes=4_000_000)).line()
    assert plain.endswith("hits 75.0% | disk 2.0 MB/token, 0.0 ms stall, 0.0 kB for the prompt")
    with_link = stats_of(
        Counters(
            hits=3,
            misses=1,
            ram_hits=1,
            ram_misses=3,
            disk_bytes=4_000_000,
            link_bytes=6_000_000,
            cpu_experts=2,
            disk_stall_ns=3_000_000,
            link_stall_ns=5_000_000,
        ),
        Counters(link_bytes=9_000_000),
    )
    assert with_link.line().endswith(
        "hits 75.0% on the device, 25.0% of the rest in RAM | disk 2.0 MB/token, 1.5 ms stall, 0.0 kB for the prompt"
        " | link 3.0 MB/token, 2.5 ms stall, 9.0 MB for the prompt; 2 misses on the CPU"
    )
    record = with_link.as_dict()
    assert (record["link_bytes_per_token"], record["cpu_experts"], record["prefill_link_bytes"]) == (3e6, 2, 9e6)
