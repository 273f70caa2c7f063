"""Probing: figures are kept, read back, and never trusted when damaged; no write access and no file are no crash."""

from __future__ import annotations

import errno
import itertools
import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from inline_copier import InlineCopier

from offmoe.checkpoint.index import CheckpointIndex
from offmoe.checkpoint.locate import demo_model_folder
from offmoe.cli.main import main
from offmoe.cli.probe import probe_machine
from offmoe.core.errors import UsageError
from offmoe.core.files import PendingFile
from offmoe.kernels.cpu.loader import load_cpu_kernels
from offmoe.machine.record import (
    DriveSpeed,
    LayerCosts,
    MachineRecord,
    drive_key,
    read_record,
    record_path,
    write_record,
)  # fmt: skip
from offmoe.probe import layers as probe_layers
from offmoe.probe import sample_experts, speeds
from offmoe.probe.probe import measure_drive, run_probe
from offmoe.probe.sample_experts import MOST_S, REPEATS, SampleExperts, usual_s
from offmoe.probe.speeds import FORMATS, TURNED, TURNED_OFF_LINES, drive_speed, link_costs

COSTS = LayerCosts(whole_s=1e-4, whole_token_s=1e-3, modules_s=5e-4, token_s=2e-3, watched_s=0.0, fetch_s=1e-4)
RECORD = MachineRecord(
    name="a machine", ram_bytes=1 << 34, num_cores=4, read_bytes_per_s=3e10,
    cpu_bytes_per_s={"bf16": 2e10, "int4": 1e10}, cpu_flops_per_s=1e11, latent_flops_per_s=5e10,
    latent_bytes_per_s=8e9, cached_bytes_per_s=4e10,
    cache_bytes=1 << 25, layers=COSTS, cached_layers=COSTS, libraries_bytes=1 << 28,
    drives={"fd00": DriveSpeed(direct_bytes_per_s=2e9, buffered_bytes_per_s=None, measured_on="x")},
)  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OFFMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("psutil.cpu_percent", lambda interval: 0.0)  # whatever runs beside the tests
    return tmp_path / "cache"


def test_kept_and_read_back() -> None:
    assert read_record() is None
    assert write_record(RECORD) is None
    assert read_record() == RECORD
    assert [path.name for path in record_path().parent.iterdir()] == [record_path().name]
    assert RECORD.cpu_rate("int4") == 1e10 and RECORD.cpu_rate("q4_k") == 1e10


@pytest.mark.parametrize(
    "change",
    [
        {"version": 99}, {"read_bytes_per_s": -1}, {"read_bytes_per_s": "fast"}, {"cpu_bytes_per_s": {}},
        {"cpu_bytes_per_s": [1]}, {"drives": 3}, {"layers": None}, {"layers": {"whole_s": 1}},
        {"cached_layers": {**asdict(COSTS), "whole_s": "x"}},
        {"layers": {**asdict(COSTS), "fetch_s": -1}}, {"more": 1}, {"drives": {"a": {"b": 1}}},
    ],
    ids=str,
)  # fmt: skip
def test_a_damaged_record_counts_as_none(change: dict[str, object]) -> None:
    write_record(RECORD)
    held = json.loads(record_path().read_text())
    record_path().write_text(json.dumps(held | change))
    assert read_record() is None


@pytest.mark.parametrize("text", ["", "[]", "null", "[" * 100_000])
def test_no_record_at_all(text: str) -> None:
    write_record(RECORD)
    record_path().write_text(text)
    assert read_record() is None


def test_a_folder_that_cannot_be_written(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One warning, and the figures all the same."""
    own_cache.write_text("a file where the folder should be")
    write_why = write_record(RECORD)
    assert write_why is not None and str(own_cache) in write_why
    monkeypatch.setattr("offmoe.probe.probe.run_probe", lambda *_, **__: RECORD)
    monkeypatch.setattr("offmoe.cli.probe.process_baseline_bytes", lambda: 0)
    with pytest.warns(UserWarning, match="the figures are not kept") as caught:
        assert probe_machine(None, None, refresh=False, quiet=True) == RECORD
    assert len(caught) == 1


def test_a_full_drive(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line about it, and nothing half written: the probe itself writes to no drive."""

    def commit(pending: PendingFile) -> None:
        pending.file.close()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("offmoe.probe.probe.run_probe", lambda *_, **__: RECORD)
    monkeypatch.setattr("offmoe.cli.probe.process_baseline_bytes", lambda: 0)
    monkeypatch.setattr(PendingFile, "commit", commit)
    with pytest.warns(UserWarning, match="not kept: .*No space left on device; set OFFMOE_CACHE") as caught:
        assert probe_machine(None, None, refresh=False, quiet=True) == RECORD
    assert len(caught) == 1 and not list(own_cache.iterdir())


def test_without_a_place_for_a_model_of_one_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers are then told apart by hooks."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with probe_layers._demo(0) as engine:
        whole = probe_layers._resident_costs(engine, None, 1e12)
        monkeypatch.setattr(probe_layers.tempfile, "TemporaryDirectory", refuse)
        assert probe_layers._times_by_depth(engine, None) is None
        assert probe_layers._resident_costs(engine, None, 1e12).keys() == whole.keys()
    # Differences of medians: on a busy machine nothing may be left of them.
    assert whole["whole_token_s"] >= 0 and whole["modules_s"] >= 0


def test_what_is_known_is_not_measured_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    here = drive_key(demo_model_folder())
    known = replace(RECORD, drives={here: RECORD.drives["fd00"]})
    write_record(known)
    assert probe_machine(None, None, refresh=False, quiet=True) == known
    write_record(RECORD)  # of another drive: that one is added
    found = probe_machine(None, None, refresh=False, quiet=True)
    assert set(found.drives) == {"fd00", here} and read_record() == found
    with pytest.raises(UsageError, match="not both"):
        probe_machine("a/b", tmp_path, refresh=False, quiet=True)
    with pytest.raises(UsageError, match="does not exist"):
        probe_machine(None, tmp_path / "none", refresh=False, quiet=True)


def test_all_of_it_over_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speeds, "DISK_S", 0.05)
    told: list[str] = []
    record = run_probe(
        demo_model_folder(), baseline_bytes=0, progress=lambda stage, done, total: told.append(f"{done}/{total}"),
        small=True,
    )  # fmt: skip
    assert write_record(record) is None and read_record() == record
    assert told[0] == "1/12" and told[-1] == "12/12"
    kernels, _ = load_cpu_kernels()
    assert set(record.cpu_bytes_per_s) == (set(FORMATS) if kernels is not None else {"bf16", TURNED, TURNED_OFF_LINES})
    if kernels is not None:
        kernels.close()
    assert record.libraries_bytes > 50 << 20
    assert record.device_name is None or torch.cuda.is_available()


def test_a_drive_is_only_read(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x" * 10_000)
    before = (tmp_path / "model.safetensors").stat().st_mtime_ns
    found = drive_speed(tmp_path / "model.safetensors", most_bytes=1 << 20, most_s=0.2)
    assert found.buffered_bytes_per_s is not None and found.buffered_bytes_per_s > 0
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").stat().st_mtime_ns == before
    (tmp_path / "empty").mkdir()
    assert measure_drive(tmp_path / "empty") == {}
    (tmp_path / "tiny").write_bytes(b"y")
    assert drive_speed(tmp_path / "tiny") == DriveSpeed(
        direct_bytes_per_s=None, buffered_bytes_per_s=None, measured_on="tiny"
    )


def test_a_drive_that_is_asked_late_has_a_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine may begin the first read when the time for all of them is over: 0 bytes a second is no speed."""
    (tmp_path / "model.safetensors").write_bytes(b"x" * 20_480)
    clock = itertools.count(0, 100)
    monkeypatch.setattr(speeds.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(speeds, "NUM_THREADS", 1)
    monkeypatch.setattr(speeds, "PIECE_BYTES", 4096)
    found = drive_speed(tmp_path / "model.safetensors", most_s=0.2)
    # The clock is asked when it begins, before the second piece, and at the end.
    assert found.buffered_bytes_per_s == 4096 / 200


@pytest.mark.parametrize("name", FORMATS)
def test_sample_experts_are_alike_in_bytes(name: str) -> None:
    experts = SampleExperts(
        FORMATS[name],
        width_D=256,
        width_F=128,
        working_set=1 << 18,
        turned=name.startswith(TURNED),
        shift=48 * (name != TURNED),
    )
    bits = {
        "bf16": 16,
        "packed": 12 + 8 * (512 * 8 + 2 * 4) / (3 * 256 * 128),  # heads of rows, and an escape a matrix
        TURNED: 16,
        TURNED_OFF_LINES: 16,
        "int8": 8.5,
        "int4": 4.5,
        "fp8": 8 + 32 / 128**2,
        "mxfp4": 4.25,
    }[name]
    assert experts.expert_bytes == 3 * 256 * 128 * bits / 8
    assert experts.bytes_per_s(None, repeats=1) > 0
    experts.close()


def test_the_link_beside_the_cpu() -> None:
    """With RAM for a device: the pair that the arbiter uses."""
    costs = link_costs(InlineCopier(), torch.device("cpu"), None, lambda: None)
    assert 0 < costs.link_beside_cpu_bytes_per_s <= costs.link_bytes_per_s
    assert 0 < costs.cpu_beside_link_bytes_per_s <= costs.cpu_bytes_per_s


def test_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    write_record(replace(RECORD, drives={drive_key(demo_model_folder()): RECORD.drives["fd00"]}))
    result = CliRunner().invoke(main, ["probe", "--json"], catch_exceptions=False)
    assert json.loads(result.stdout)["cpu_bytes_per_s"] == RECORD.cpu_bytes_per_s
    shown = CliRunner().invoke(main, ["probe"], catch_exceptions=False).stdout
    assert "experts on the CPU, int4" in shown and "10.00 GB/s" in shown and "no CUDA device" in shown
    plan = CliRunner().invoke(main, ["plan", "--device", "cpu", "--json"], catch_exceptions=False)
    found = json.loads(plan.stdout)
    assert found["machine"]["name"] == "a machine" and found["prediction"]["decode_tok_per_s"] > 0
    tokenizer_bytes = CheckpointIndex.open(demo_model_folder()).tokenizer_bytes
    assert 0 < tokenizer_bytes < 2 << 20
    assert found["memory"]["runtime_bytes"] == RECORD.libraries_bytes + tokenizer_bytes


def test_no_figure_takes_long_on_a_slow_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted on a clock of its own: each stops at its limit, and all limits together leave a third of 30 seconds."""
    now = [0.0]
    monkeypatch.setattr(sample_experts.time, "perf_counter", lambda: now[0])

    def work(seconds: float) -> None:
        now[0] += seconds

    fast = partial(work, 0.001)
    assert usual_s(fast) == pytest.approx(0.001) and now[0] == pytest.approx((1 + REPEATS) * 0.001)
    now[0] = 0.0
    assert usual_s(partial(work, 0.4), repeats=100) == pytest.approx(0.4) and now[0] <= MOST_S + 0.4
    now[0] = 0.0
    assert usual_s(partial(work, 9.0)) == 9.0 and now[0] == 18.0  # once to warm up, and once
    num_figures = len(FORMATS) + 3  # memory, experts in caches, products of many rows
    assert num_figures * MOST_S + 2 * speeds.DISK_S < 20
