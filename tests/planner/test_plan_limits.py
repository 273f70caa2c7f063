"""Budgets, devices and prompts beyond what there is: refused with both numbers, before weights are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psutil
import pytest
from commands import fail, invoke, last_json, succeed
from engines import open_tiny, save_tiny
from makers import one_line

import offmoe
from offmoe.core.config import make_config
from offmoe.core.errors import ContextLengthError, UsageError
from offmoe.machine.record import MachineRecord
from offmoe.planner import make_plan as predict_plan
from offmoe.planner.machines import find_machine
from offmoe.report.plan_table import plan_tables

LAPTOP, OTHER = ("--for", "RTX 4060 laptop"), "laptop without GPU, 16 GB"
ADVICE = "leave it out, or plan for another machine with --for"


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict_plan, "free_vram_bytes", lambda: None)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--device", "cuda"), f"device is cuda, and nvidia-smi shows no GPU here; {ADVICE}"),
        (("--vram", "6GiB"), f"vram is set, and nvidia-smi shows no GPU here; {ADVICE}"),
        (("--device", "cuda", "--for", OTHER), f"device is cuda, and '{OTHER}' has no GPU; {ADVICE}"),
        (("--vram", "100GiB", *LAPTOP), "vram is 100.00 GiB, the machine has 8.00 GiB in all; lower --vram, or leave"),
        (("--ram", "500GiB", *LAPTOP), "ram is 500.00 GiB, the machine has 32.00 GiB in all; lower --ram, or leave"),
        (("--ram", "6"), 'ram is 6 bytes, which nothing fits in; write a unit: "6GiB"'),
    ],
)  # fmt: skip
def test_a_plan_of_what_is_not_there_is_refused(without_gpu: None, options: tuple[str, ...], said: str) -> None:
    assert fail("plan", *options).startswith(said)


def test_more_memory_than_the_machine_has_is_refused_when_loading(tiny: Path) -> None:
    total = psutil.virtual_memory().total
    with pytest.raises(UsageError) as caught:
        open_tiny(tiny, ram=total + (1 << 30))
    assert "the machine has" in one_line(caught) and "lower --ram" in one_line(caught)


@pytest.mark.parametrize("size", [6, "6", " 900 ", 1])
def test_bare_numbers_of_a_few_bytes_are_no_sizes(size: Any) -> None:
    with pytest.raises(UsageError, match="write a unit"):
        make_config(ram=size)
    assert make_config(ram=str(6 << 30)).ram == make_config(ram="6GiB").ram == 6 << 30


def test_what_does_not_fit_ends_with_one(tiny: Path) -> None:
    result = invoke("plan", tiny, "--ram", "2MiB")
    assert result.exit_code == 1 and "does not fit: ram is 2.0 MiB" in result.stdout
    result = invoke("plan", tiny, "--ram", "2MiB", "--json")
    found = json.loads(result.stdout.splitlines()[-1])
    assert (result.exit_code, found["fits"], found["memory"]) == (1, False, None)
    assert last_json(succeed("plan", tiny, "--json").stdout)["fits"]


def test_one_workspace_has_one_size() -> None:
    found = predict_plan.run_plan(None, make_config(), machine="RTX 4060 laptop")
    assert found.memory is not None and found.memory.device is not None
    rows = dict(plan_tables(found)[1][1])
    assert rows["workspace"] in found.line() and f"workspace {rows['workspace']}" in found.line()
    assert rows["kept free"] == "192.0 MiB"


def test_a_prompt_without_room_is_told_what_helps(tiny: Path) -> None:
    """The tiny model was made for 256 tokens."""
    with open_tiny(tiny, context_length=32) as engine:
        with pytest.raises(ContextLengthError, match="use --context-length 51 or more"):
            engine.generate([5] * 50)
        with pytest.raises(ContextLengthError, match="shorten it: the model was made for 256"):
            engine.generate([5] * 300)


def test_a_long_prompt_is_refused_before_weights_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offmoe.api, "load", lambda *args, **options: pytest.fail("weights are read"))
    assert "use --context-length" in fail("generate", "--prompt", "word " * 200, "--context-length", "64")
    assert "the model was made for 2048" in fail("generate", "--prompt", "word " * 3000)


def test_figures_taken_on_a_busy_machine_are_marked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OFFMOE_CACHE", str(tmp_path))
    monkeypatch.setattr("psutil.cpu_percent", lambda interval: 80.0)
    record: MachineRecord = find_machine("laptop without GPU, 16 GB")
    monkeypatch.setattr("offmoe.probe.probe.run_probe", lambda *args, **options: record)
    with pytest.warns(UserWarning, match=r"other programs use 80.0% of the processors"):
        found = last_json(succeed("probe", "--json").stdout)
    assert found["busy_share"] == 0.8
    monkeypatch.setattr("offmoe.machine.record.fingerprint", lambda: "x")
    title = plan_tables(predict_plan.run_plan(None, make_config(device="cpu")))[-1][0]
    assert title.startswith("settings") or "80.0% of the processors" in title
