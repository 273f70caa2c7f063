"""`offmoe trace`, `replay` and `tune`, and the flags that tune saves for the other commands."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import command_line, environment, fail, invoke, last_json, succeed
from engines import leaves_nothing, open_tiny, save_tiny
from patience import PATIENCE_S

from offmoe.checkpoint.identity import model_hash
from offmoe.core.saved_flags import read_flags, write_flags
from offmoe.trace.reader import read_trace

RAM = ("--ram", "4GiB")
SMALL = ("--expert-slots", 6)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without a tokenizer."""
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def recorded(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace of it."""
    path = tmp_path_factory.mktemp("trace") / "tiny.trace"
    with open_tiny(tiny) as engine, engine.trace(path):
        engine.generate([5, 6, 7, 8], max_new_tokens=60, temperature=2.0, seed=1)
    return path


@pytest.fixture(autouse=True)
def _nothing_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))
    monkeypatch.setenv("COLUMNS", "80")
    with leaves_nothing():
        yield


def saved(tmp_path: Path) -> Path:
    return tmp_path / "settings" / "offmoe" / "models.json"


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_trace_goes_through_every_prompt(tiny: Path, tmp_path: Path) -> None:
    prompts = write(tmp_path / "p.txt", "[5, 6, 7]\n\n[1, 2]\n")
    flags = ("--max-new-tokens", 5, "--temperature", 1, "--seed", 3, *RAM)
    result = succeed("trace", tiny, "--prompts", prompts, "-o", tmp_path / "t", *flags)
    assert re.fullmatch(rf"{tmp_path}/t: 8 decoded tokens of 2 prompts, 20 layer calls, [\d.]+ \w+\n", result.stdout)
    trace = read_trace(tmp_path / "t", model_hash=model_hash(tiny))
    assert trace.is_complete and trace.prompt_starts == [0, 10] and trace.events[-1].guesses.keys() == {1}
    about = {"count": 2, "max_new_tokens": 5, "temperature": 1.0, "seed": 3, "file": "p.txt"}
    assert trace.header.prompts == about
    flags = ("--max-new-tokens", 5, "--temperature", 1, "--seed", 3, *SMALL, "--no-guesses", "--json")
    record = last_json(succeed("trace", tiny, "--prompts", prompts, "-o", tmp_path / "u", *flags).stdout)
    again = read_trace(tmp_path / "u")
    assert [event.ids for event in again.events] == [event.ids for event in trace.events]
    assert (record["layer_calls"], record["decoded_tokens"], record["prompts"]) == (20, 8, 2)
    assert record["bytes"] == (tmp_path / "u").stat().st_size and record["engine"]["experts_cached"] == 6


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty; write one prompt a line"),
        ("[5, 6]\n[5000000]", "token id 5000000 is not in the vocabulary"),
        ("[5, 6]\nwords", "the model has no tokenizer"),
        ("[" + "5, " * 200 + "5]", "prompt 1 has 201 tokens, the context 64"),
    ],
)
def test_prompts_are_checked_before_anything_runs(tiny: Path, tmp_path: Path, text: str, words: str) -> None:
    prompts = write(tmp_path / "p", text)
    assert words in fail("trace", tiny, "--prompts", prompts, "-o", tmp_path / "t", *RAM, "--context-length", 64)
    assert not (tmp_path / "t").exists() and not (tmp_path / "t.partial").exists()


def test_prompts_of_the_bundled_model_are_text(tmp_path: Path) -> None:
    prompts = write(tmp_path / "p", 'import os\n"def f(x):\\n    "\n')
    lines = last_json(
        succeed("trace", "--prompts", prompts, "-o", tmp_path / "t", "--max-new-tokens", 2, "--json", *RAM).stdout
    )
    whole = last_json(
        succeed(
            "trace", "--prompts", prompts, "--whole", "-o", tmp_path / "t", "--max-new-tokens", 2, "--json", *RAM
        ).stdout
    )
    assert (lines["prompts"], whole["prompts"]) == (2, 1)
    bad = tmp_path / "bad"
    bad.write_bytes(b"\xff\xfe")
    assert "no UTF-8 text" in fail("trace", "--prompts", bad, "-o", tmp_path / "t")
    assert "cannot be read: No such file" in fail("trace", "--prompts", tmp_path / "no", "-o", tmp_path / "t")
    assert "cannot be written to" in fail("trace", "--prompts", prompts, "-o", prompts / "t")
    assert "it is a folder" in fail("trace", "--prompts", prompts, "-o", tmp_path)


def test_ctrl_c_keeps_what_was_recorded(tiny: Path, tmp_path: Path) -> None:
    prompts, output = write(tmp_path / "p", "[5]\n" * 2000), tmp_path / "t"
    flags = ("--max-new-tokens", "50", "--context-length", "64", *RAM)
    process = subprocess.Popen(
        command_line("trace", tiny, "--prompts", prompts, "-o", output, *flags), stderr=subprocess.PIPE, text=True,
        env=environment(),
    )  # fmt: skip
    partial = tmp_path / "t.partial"
    deadline = time.monotonic() + PATIENCE_S
    while not (partial.exists() and partial.stat().st_size > 4000):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130, errors
    trace = read_trace(output)
    assert not trace.is_complete and len(trace.events) > 100 and not partial.exists()
    kept = f"{len(trace.events)} layer calls of {len(trace.prompt_starts)} prompts are used"
    assert f"its recording was stopped before its end: {kept}" in errors and errors.endswith("stopped\n")


def test_replay_needs_no_model(tiny: Path, recorded: Path, tmp_path: Path) -> None:
    result = succeed("replay", recorded, "--expert-slots", 6, "--plot", tmp_path / "a.svg")
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"{tiny.name}: 16 experts of ") and lines[0].endswith(", 59 decoded tokens")
    assert lines[1].split()[:2] == ["slots", "memory"] and "tok/s" not in lines[1]
    assert any(line.split()[0] == "6" and line.endswith("fits") for line in lines[2:] if line[:1] == " ")
    assert lines[-1] == f"plot: {tmp_path / 'a.svg'}" and "\x1b" not in result.stdout
    record = last_json(succeed("replay", recorded, "--json").stdout)
    assert record["note"] is None and record["curves"]["fit"] is None
    assert set(record["curves"]["by_policy"]) == {"lru", "belady", record["curves"]["adopted"]}


def test_replay_in_a_narrow_terminal(recorded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert max(map(len, succeed("replay", recorded, "--no-color").stdout.splitlines())) <= 40


def test_traces_that_are_cut_off_empty_or_of_another_model(tiny: Path, recorded: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    cut.write_bytes(recorded.read_bytes()[:-30])
    result = succeed("replay", cut)
    assert re.match(rf"{cut}: it is cut off at byte \d+ of \d+: 120 layer calls of 1 prompts are used", result.stderr)
    assert last_json(succeed("replay", cut, "--json").stdout)["note"].startswith("it is cut off")
    cut.write_bytes(b"")
    assert "it has 0 bytes" in fail("replay", cut)
    assert f"is a trace of another model ({tiny.name}, " in fail("tune", "--trace", recorded, *SMALL)
    assert "does not begin as a trace does" in fail("replay", tiny / "model.safetensors")


def test_tune_saves_flags_that_the_other_commands_use(tiny: Path, tmp_path: Path) -> None:
    result = succeed("tune", tiny, *SMALL, "--max-new-tokens", 30, "--context-length", 64)
    lines = result.stdout.splitlines()
    assert any(re.match(r"costs: .* a token with all experts in memory, .* of missing experts", line) for line in lines)
    chosen = next(line for line in lines if line.startswith("chosen: 6 slots, "))
    assert re.search(r"[\d.]+% hits, [\d.]+ tok/s; bound [\d.]+%$", chosen)
    entry = json.loads(saved(tmp_path).read_text())["models"][model_hash(tiny)]
    policy = entry["flags"]["policy"]
    assert entry["flags"] == {"expert_slots": 6, "policy": policy}
    flags = f"--expert-slots 6 --policy {policy} from {saved(tmp_path)} (--config off ignores it)"
    assert lines[-1] == f"written: {flags}"

    bench = ("bench", tiny, "--prefill", 4, "--decode", 4)
    used = succeed(*bench)
    assert f"flags: {flags}" in used.stderr.splitlines()
    assert last_json(used.stdout)["experts_cached"] == 6 and last_json(used.stdout)["settings"]["policy"] == policy
    for given, slots in ((("--expert-slots", 9), 9), (RAM, 16), (("--config", "off"), 16)):
        record = last_json(succeed(*bench, *given).stdout)
        assert record["experts_cached"] == slots, given
        assert record["settings"]["policy"] == ("auto" if "off" in given else policy)
    assert "flags: " not in succeed(*bench, "--json").stderr
    assert "flags: " not in succeed("bench", "--prefill", 4, "--decode", 4).stderr, "another model"


def test_saved_flags_are_shown_and_forgotten(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "flags.json"
    assert succeed("tune", "--show", "--config", file).stdout == f"none in {file}\n"
    assert succeed("tune", tiny, "--forget", "--config", file).stdout == f"{tiny.name}: nothing was saved in {file}\n"
    assert not file.exists()
    write_flags(file, model_hash(tiny), "mine", {"ram": "900MiB", "policy": "lru"})
    write_flags(file, "other", "another", {"ram": "1GiB"})
    line = f"--ram 900MiB --policy lru from {file} (--config off ignores it)"
    assert succeed("tune", "--show", "--config", file).stdout.splitlines()[0] == f"mine: {line}"
    assert succeed("tune", tiny, "--show", "--config", file).stdout == f"{tiny.name}: {line}\n"
    every = last_json(succeed("tune", "--show", "--json", "--config", file).stdout)
    assert every == {"models": {"mine": {"ram": "900MiB", "policy": "lru"}, "another": {"ram": "1GiB"}}}
    assert succeed("tune", tiny, "--forget", "--config", file).stdout == f"{tiny.name}: forgotten in {file}\n"
    assert succeed("tune", tiny, "--show", "--config", file).stdout == f"{tiny.name}: nothing is saved\n"
    assert list(json.loads(file.read_text())["models"]) == ["other"]
    assert "names no file" in fail("tune", "--show", "--config", "off")


def test_tune_chooses_a_budget_at_the_knee_and_takes_a_trace(tiny: Path, recorded: Path, tmp_path: Path) -> None:
    file = tmp_path / "own" / "flags.json"
    flags = ("--trace", recorded, "--choose", "knee", "--config", file, "--context-length", 64, "--json")
    record = last_json(succeed("tune", tiny, *SMALL, *flags).stdout)
    assert record["config"] == str(file) and record["flags"] == {
        "expert_slots": min(6, record["curves"]["knee"]), "policy": record["curves"]["adopted"],
    }  # fmt: skip
    assert record["curves"]["num_tokens"] == 59 and record["costs"]["fixed_s"] > 0
    assert not saved(tmp_path).exists()
    assert f"from {file} (" in succeed("bench", tiny, "--prefill", 4, "--decode", 4, "--config", file).stderr


def test_tune_has_nothing_to_say_where_all_fits(tiny: Path, tmp_path: Path) -> None:
    result = succeed("tune", tiny, *RAM)
    assert result.stdout.startswith("all 16 experts fit already, in ") and "there is nothing to choose" in result.stdout
    record = last_json(succeed("tune", tiny, *RAM, "--json").stdout)
    assert record == {"model": tiny.name, "everything_fits": True, "flags": {}}
    assert not saved(tmp_path).exists()


def test_places_that_cannot_be_written_are_told_at_once(tiny: Path, recorded: Path, tmp_path: Path) -> None:
    blocked = write(tmp_path / "file", "") / "sub" / "flags.json"
    assert "the chosen flags cannot be written to" in fail("tune", tiny, "--config", blocked)
    assert "the plot cannot be written to" in fail("replay", recorded, "--plot", blocked.with_suffix(".png"))
    assert "neither .png nor .svg" in fail("replay", recorded, "--plot", tmp_path / "a.gif")


def test_folders_of_results_are_made(recorded: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    succeed("replay", recorded, "--plot", tmp_path / "new" / "plot.svg")
    assert (tmp_path / "new" / "plot.svg").exists()
    prompts = write(tmp_path / "p", "Once\n")
    succeed("trace", "--prompts", prompts, "-o", tmp_path / "other" / "t", "--max-new-tokens", 2, *RAM)
    assert (tmp_path / "other" / "t").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is no file of flags"),
        ("[]", "is no file of flags"),
        ('{"models": {"HASH": {"flags": {"warp": 9}}}}', "has the flag 'warp', which is none"),
        ('{"models": {"HASH": {"flags": {"fast_activations": true}}}}', "fast_activations is gone: it was not faster"),
        ('{"models": {"HASH": {"flags": {"policy": "s3fifo"}}}}', "policy s3fifo is gone: it read up to 21% more"),
        ('{"models": {"HASH": {"flags": {"ram": "lots"}}}}', "ram is 'lots', not a size"),
    ],
)
def test_a_damaged_file_of_flags_warns_or_is_refused_if_named(
    tiny: Path, tmp_path: Path, text: str, words: str
) -> None:
    saved(tmp_path).parent.mkdir(parents=True)
    write(saved(tmp_path), text.replace("HASH", model_hash(tiny)))
    bench = ("bench", tiny, "--prefill", 4, "--decode", 4, *SMALL)
    own = invoke(*bench)
    assert own.exit_code == 0 and own.stderr.startswith("warning: ") and words in own.stderr.splitlines()[0]
    assert words in fail(*bench, "--config", saved(tmp_path))
    assert "cannot be read: No such file" in fail(*bench, "--config", tmp_path / "no")


def test_old_names_of_expert_slots_are_read_and_said(recorded: Path, tiny: Path, tmp_path: Path) -> None:
    new, old = (succeed("replay", recorded, flag, 6, "--json") for flag in ("--expert-slots", "--experts"))
    assert last_json(old.stdout) == last_json(new.stdout)
    assert old.stderr == "--experts is called --expert-slots now; the next release drops the old name\n"
    path = tmp_path / "flags.json"
    write_flags(path, model_hash(tiny), tiny.name, {"experts": 6, "policy": "lru"})
    found = read_flags(path, model_hash(tiny), {})
    assert found is not None and found.flags == {"expert_slots": 6, "policy": "lru"}
