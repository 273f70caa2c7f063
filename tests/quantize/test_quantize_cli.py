"""`offmoe quantize` as a user meets it: what it prints, what it refuses, and what is left of a run that was killed."""

from __future__ import annotations

import math
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import TIMEOUT_S, command_line, environment, fail, invoke, last_json, run, succeed
from engines import leaves_nothing, save_tiny

import offmoe
from offmoe.checkpoint.locate import demo_model_folder
from offmoe.core.errors import UsageError
from offmoe.report import perplexity as module
from offmoe.report.perplexity import perplexity

DEMO = demo_model_folder()
TEXT = "def read_lines(path):\n    with open(path) as file:\n        return file.read().splitlines()\n" * 4
INT4 = ("--expert-format", "int4")


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    with leaves_nothing():
        yield


def test_sizes_and_perplexity_before_and_after(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    result = succeed("quantize", DEMO, tmp_path / "out", *INT4, "--eval", tmp_path / "text.txt")
    sizes, cost = result.stdout.splitlines()
    assert "16.2 MiB -> 6.5 MiB (40.2%): 192 experts in int4, groups of 32; 0 other linear layers" in sizes
    found = re.fullmatch(r"perplexity on (\d+) tokens: ([\d.]+) -> ([\d.]+) \(([+-][\d.]+)%\)", cost)
    assert found is not None, cost
    for folder, printed in ((DEMO, found[2]), (tmp_path / "out", found[3])):
        with offmoe.load(folder, ram="4GiB") as engine:
            assert engine.tokenizer is not None
            ids = engine.tokenizer(TEXT)["input_ids"]
            assert len(ids) == int(found[1]) + 1
            assert float(printed) == pytest.approx(perplexity(engine, ids).value, rel=1e-3)
    assert abs(float(found[4])) < 10
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"tokenizer.json", "generation_config.json"}
    assert "int4, groups of 32" in succeed("inspect", tmp_path / "out").stdout
    text = succeed("generate", tmp_path / "out", "--prompt", "def f(x):", "--max-new-tokens", 8, "--ram", "4GiB").stdout
    assert len(text) > 8


def test_json(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    args = ("--expert-format", "int8", "--dense", "int4", "--group", 64, "--eval", tmp_path / "text.txt", "--json")
    record = last_json(succeed("quantize", DEMO, tmp_path / "out", *args).stdout)
    assert record["num_experts"] == 192 and record["num_dense"] == 24 and record["resumed"] == 0
    assert record["written_bytes"] < record["source_bytes"] and record["target"] == str(tmp_path / "out")
    assert record["perplexity_before"] > 1 and record["perplexity_after"] > 1


def test_perplexity_predicts_each_token_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with offmoe.load(save_tiny(tmp_path), ram="4GiB") as engine:
        ids = [(7 * position + position // 5) % 120 for position in range(45)]
        with torch.inference_mode():

            def losses(begin: int, end: int) -> torch.Tensor:
                logits = engine.model(input_ids=torch.tensor([ids[begin:end]]), use_cache=False).logits[0, :-1].float()
                wanted = torch.tensor(ids[begin + 1 : end])
                return torch.nn.functional.cross_entropy(logits, wanted, reduction="none")

            whole = perplexity(engine, ids)
            assert whole.num_tokens == 44
            assert whole.nats == pytest.approx(float(losses(0, 45).sum()), rel=1e-5)
            assert whole.value == pytest.approx(math.exp(whole.nats / 44))
            monkeypatch.setattr(module, "WINDOW", 20)
            seen: list[int] = []
            windowed = perplexity(engine, ids, lambda done, total: seen.append(done))
            # Windows begin at 0, 10, 20, 30; each adds the tokens that the one before did not reach.
            parts = [losses(0, 20), losses(10, 30)[9:], losses(20, 40)[9:], losses(30, 45)[9:]]
            assert windowed.nats == pytest.approx(float(torch.cat(parts).sum()), rel=1e-5)
            assert seen == [19, 29, 39, 44]
        with pytest.raises(UsageError, match="has 1 tokens"):
            perplexity(engine, ids[:1])


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), ("missing option '--expert-format'", "int4")),
        (("--expert-format", "int3"), ("--expert-format", "'int3'", "'int4', 'int8'")),
        ((*INT4, "--group", "48"), ("--group", "'48'", "'32', '64', '128'")),
        ((*INT4, "--group", "128"), ("does not divide the 192 columns", "use --group 32 or 64")),
        ((*INT4, "--eval", "no-such-file"), ("--eval no-such-file cannot be read",)),
    ],
)
def test_mistakes(args: tuple[str, ...], words: tuple[str, ...], tmp_path: Path) -> None:
    text = fail("quantize", DEMO, tmp_path / "out", *args)
    for word in words:
        assert word in text
    assert not (tmp_path / "out").exists()


def test_targets_that_are_refused(tmp_path: Path) -> None:
    shutil.copytree(DEMO, tmp_path / "model")
    before = sorted(path.name for path in (tmp_path / "model").iterdir())
    assert "source and target are both" in fail("quantize", tmp_path / "model", tmp_path / "model", *INT4)
    assert "is inside of" in fail("quantize", tmp_path / "model", tmp_path / "model" / "new", *INT4)
    assert "is not empty" in fail("quantize", DEMO, tmp_path / "model", *INT4)
    assert "is a file" in fail("quantize", DEMO, tmp_path / "model" / "config.json", *INT4)
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == before


def test_no_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5 << 20))
    assert "are still to be written" in fail("quantize", DEMO, tmp_path / "out", *INT4)
    monkeypatch.undo()
    succeed("quantize", DEMO, tmp_path / "out", *INT4)


def test_an_eval_text_for_a_model_without_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    source = save_tiny(tmp_path / "source")
    text = fail("quantize", source, tmp_path / "out", *INT4, "--eval", tmp_path / "text.txt")
    assert "no tokenizer" in text
    (tmp_path / "text.txt").write_bytes(b"\xff")
    assert "no UTF-8 text" in fail("quantize", DEMO, tmp_path / "out", *INT4, "--eval", tmp_path / "text.txt")


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_a_run_that_was_killed_goes_on(tmp_path: Path) -> None:
    target = tmp_path / "out"
    process = subprocess.Popen(
        command_line("quantize", DEMO, target, *INT4), env=environment(), stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    limit = time.monotonic() + TIMEOUT_S
    while not list(target.glob("model-*.writing")) and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (target / "config.json").exists()
    assert "no config.json" in fail("inspect", target)
    done = run("quantize", DEMO, target, *INT4)
    assert done.returncode == 0, done.stderr
    assert not [path.name for path in target.iterdir() if path.name.startswith(".") or path.suffix == ".writing"]
    assert "192 in all" in succeed("inspect", target).stdout


def test_the_old_name_of_the_format_is_said() -> None:
    result = invoke("quantize", DEMO, "never-written", "--experts", "int4", "--eval", "no-such-file")
    assert (
        result.stderr.splitlines()[0] == "--experts is called --expert-format now; the next release drops the old name"
    )
    assert "--eval no-such-file cannot be read" in result.stderr and result.exit_code == 2
