"""scripts/gpu_check and what it is made of, without a GPU: parts that fail, time that is up, results on disk."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from benchlib.device_checkpoint import make_model
from benchlib.device_exact import same_ids
from benchlib.device_report import device_tables
from benchlib.families import FAMILIES
from benchlib.gpu_check import main, render, table
from benchlib.gpu_parts import Outcome, Part, plan_parts, run_part
from benchlib.ledger import Ledger, TimeIsUpError
from patience import PATIENCE_S
from places import SCRIPTS
from transformers import AutoModelForCausalLM

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


def python_part(code: str, **options: Any) -> Part:
    return Part(key="test", title="a test", command=(sys.executable, "-c", code), limit_s=60, **options)


# --- the script


@without_cuda
def test_without_cuda_it_says_so_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: no CUDA device: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--part", "everything"], "--part 'everything' is no part; known: "),
        (["--spoil", "copier=nicely"], "--spoil copier=nicely: use PART=HOW of "),
        (["--spoil", "copier"], "hang, crash, memory"),
    ],
)
def test_unknown_parts_are_refused(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*options, "--out", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_shorter_checks_have_the_first_parts(tmp_path: Path) -> None:
    parts = plan_parts(simulate=False, models=tmp_path)
    minutes = [part.minutes for part in parts]
    assert minutes == sorted(minutes), "parts are in order of what they decide"
    for limit, reserve_s in ((3, 20), (6, 20)):
        needed = sum(part.limit_s for part in parts if part.minutes <= limit and part.key != "build")
        assert needed <= 60 * limit + 120 - reserve_s, "limits are what a part may take, not what it takes"


def simulated_check(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = [str(SCRIPTS / "gpu_check"), "--simulate", "--out", str(out), *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@without_cuda
def test_a_rehearsal_keeps_every_result_that_there_is(tmp_path: Path) -> None:
    """One part hangs, one crashes, one is refused memory: the others' results are in the files, and each says how."""
    done = simulated_check(tmp_path, "--minutes", "9", "--spoil", "copier=hang,engine=crash,verify=memory,build=crash")
    assert done.returncode == 1, done.stdout + done.stderr[-3000:]
    (result,), (records_file,), (log,) = (
        list(tmp_path.glob(f"*-gpu-simulated.{kind}")) for kind in ("md", "json", "log")
    )
    found = json.loads(records_file.read_text(encoding="utf-8"))
    failures = {part["part"]: part["failure"] for part in found["parts"] if part["failure"]}
    assert failures.pop("build", "ended by SIGABRT") == "ended by SIGABRT"  # there may be no compiler
    assert failures == {
        "copier": "ended at its limit of 20 s", "engine": "ended by SIGABRT", "verify": "exit code 1",
    }, done.stderr[-3000:]  # fmt: skip
    by_part = {record["part"] for record in found["records"]}
    devices = {"device-25", "device-100", "device-cpu", "device-stream"}
    assert by_part == {"first", "kernels", "far-slots"} | devices
    kinds = {record["kind"] for record in found["records"]}
    assert kinds >= {"link", "token", "stall", "bandwidths", "exact", "model", "loaded", "memory", "decode", "prefill"}
    text, told = result.read_text(encoding="utf-8"), log.read_text(encoding="utf-8")
    for heading in ("### Decode", "### Prefill", "### Peak VRAM", "hanging", "crashing", "MemoryError"):
        assert heading in text, heading
    assert "time.sleep" in told or "Current thread" in told, "a hang leaves its traceback"
    assert str(tmp_path) not in text and str(SCRIPTS.parent) not in text
    assert len(done.stdout.splitlines()) <= 60 + 15


@pytest.mark.slow
def test_the_benchmark_on_a_simulated_link_runs(tmp_path: Path) -> None:
    out = tmp_path / "result.md"
    command = [
        str(SCRIPTS / "bench"),
        "simulated",
        "--layers",
        "2",
        "--ratios",
        "1.0",
        "--out",
        str(out),
    ]
    command += ["--share", "0.25", "--blocks", "2", "--block", "4", "--warmup", "4"]
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["same_ids"]
    assert set(record["results"][0]["settings"]) == {
        "stream, prefetch auto", "stream, prefetch off", "cpu", "miss auto", "all auto",
    }  # fmt: skip
    assert "- ids with and without prefetching: equal" in out.read_text(encoding="utf-8")


# --- parts


def test_a_part_passes_or_fails_by_its_exit_code() -> None:
    passed = run_part(python_part("print('fine')"), limit_s=60)
    assert (passed.failure, passed.lines) == ("", ("fine",))
    failed = run_part(python_part("import sys; print('so'); sys.exit(3)"), limit_s=60)
    assert (failed.failure, failed.last_line) == ("exit code 3", "so")
    assert run_part(python_part("import os; os.kill(os.getpid(), 9)"), limit_s=60).failure == "ended by SIGKILL"


def wait_for_end(stat: Path) -> None:
    """A killed process runs on until the scheduler gets to it. Fails by the test's own limit."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        while stat.read_text().rpartition(")")[2].split()[0] != "Z":
            time.sleep(0.01)


def test_a_part_over_its_limit_is_ended_with_its_children() -> None:
    code = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""
    for limit_s in (3, 30, 300):  # a busy machine may need seconds until the child has said who it is
        outcome = run_part(python_part(code), limit_s=limit_s)
        assert outcome.failure == f"ended at its limit of {limit_s} s"
        if outcome.lines:
            break
    wait_for_end(Path("/proc") / outcome.lines[0] / "stat")


def test_a_script_that_is_not_there_fails_its_part() -> None:
    part = Part(key="kernels", title="kernels", command=(sys.executable, "scripts/absent.py"), limit_s=1)
    assert run_part(part, limit_s=1).failure == "there is no scripts/absent.py"


def test_the_result_shows_every_part_and_the_end_of_what_failed() -> None:
    passed = Outcome(part=python_part("1"), seconds=1.2, failure="", lines=("== 3 passed ==", '{"json": 1}'))
    failed = Outcome(part=python_part("2"), seconds=2, failure="exit code 1", lines=("AssertionError: no",))
    assert table([passed, failed])[-2:] == [
        "| a test | passed | 1 | 3 passed |",
        "| a test | exit code 1 | 2 | AssertionError: no |",
    ]
    assert "AssertionError: no" in render([passed, failed], [])


# --- what the benchmark on the device is made of


def test_every_record_is_on_disk_at_once(tmp_path: Path) -> None:
    path = tmp_path / "made" / "partial.json"
    ledger = Ledger(path, limit_s=60)
    ledger.add("decode", tok_per_s=1.23456789)
    assert json.loads(path.read_text(encoding="utf-8"))["records"] == [{"kind": "decode", "tok_per_s": 1.23457}]
    with ledger.step("a step"):
        raise RuntimeError("the device\nis lost")
    record = json.loads(path.read_text(encoding="utf-8"))["records"][-1]
    assert (record["where"], record["error"]) == ("a step", "RuntimeError: the device is lost")
    assert ledger.failures == [record]


def test_what_has_no_time_is_left_out_and_told() -> None:
    ledger = Ledger(None, limit_s=10)
    with pytest.raises(TimeIsUpError), ledger.step("a long step", needs_s=100):
        raise AssertionError("it must not begin")
    assert ledger.records[0]["kind"] == "skipped"
    assert not ledger.failures


def test_checks_that_do_not_hold_are_failures() -> None:
    ledger = Ledger(None, limit_s=10)
    ledger.add("memory", ok=True)
    ledger.add("memory", ok=False)
    assert len(ledger.failures) == 1


@pytest.mark.parametrize("like", ["qwen3-30b-a3b", "mixtral-8x7b"])
def test_a_made_model_is_what_transformers_loads(like: str, tmp_path: Path) -> None:
    made = make_model(tmp_path / "model", like, num_layers=2, vocab_size=300, overrides=FAMILIES[like].tiny)
    loaded: Any = AutoModelForCausalLM.from_pretrained(made.folder, output_loading_info=True, dtype="auto")
    model, info = loaded
    assert not any(info.values()), info
    assert sum(weight.nbytes for weight in model.parameters()) == made.resident_bytes + made.all_experts_bytes
    first, second = model.model.layers[0].mlp.experts.down_proj[:2]
    assert not torch.equal(first, second)


def test_ids_are_compared_up_to_the_first_that_differs() -> None:
    assert same_ids((1, 2, 3), (1, 2, 3)) == 3
    assert same_ids((1, 2, 3), (1, 9, 3)) == 1


def test_the_tables_say_what_was_reached() -> None:
    decode = {"kind": "decode", "model": "m", "share": 0.25, "tok_per_s": 100.0, "num_tokens": 8, "speed_to_first": 1.0}
    ours = {"setting": "auto", "roofline_share": 0.8, "counts": {"syncs": 16}, "limit": "link", "hit_rate": 0.5}
    peer = {"setting": "accelerate CPU offload", "tok_per_s": 4.0}
    text = "\n".join(device_tables([decode | ours, decode | peer, {"kind": "skipped", "where": "all", "why": "time"}]))
    assert "| m | 25% | auto | 100.0 | 1.00 | - | 0.80 | link | 0.500 | - | - | - | 2.0 |" in text
    assert "share of the decode bound, best setting: 0.80 of 0.75, reached" in text
    assert "faster than accelerate CPU offload: 25.00x of 20x, reached" in text
    assert "- all: time" in text
