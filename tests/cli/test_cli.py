"""What the commands print, and where: results on stdout, everything else on stderr, JSON on the last line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import COMMANDS, fail, invoke, last_json, succeed
from engines import leaves_nothing, save_tiny

import offmoe
from offmoe.planner.inspect import inspect_checkpoint
from offmoe.tiers.disk import DiskTier

RAM = ("--ram", "4GiB")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without a tokenizer."""
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    with leaves_nothing():
        yield


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    text = succeed(command, "--help").stdout
    assert text.startswith(f"Usage: offmoe {command} ")
    assert succeed(command, "-h").stdout == text
    options = re.findall(r"^  (--?[a-z-]+).*(?:\n {10,}.*)?$", text, re.MULTILINE)
    assert "-h" in options and len(options) >= 2


def test_the_bare_command_is_help() -> None:
    text = succeed().stdout
    assert text == succeed("--help").stdout
    for command in COMMANDS:
        assert re.search(rf"^  {command} +\w", text, re.MULTILINE)
    assert succeed("--version").stdout.split() == ["offmoe,", "version", offmoe.__version__]


def test_generate_prints_the_text_and_nothing_else() -> None:
    with offmoe.load(ram="4GiB") as engine:
        expected = engine.generate("def f(x):", max_new_tokens=12, temperature=0)
    options = ("--max-new-tokens", 12, "--temperature", 0, *RAM)
    result = succeed("generate", "-p", "def f(x):", "-v", *options)
    assert result.stdout == expected.text + "\n"
    plan, stats, memory = result.stderr.splitlines()
    assert plan.startswith("demo_model: 192 of 192 experts in RAM")
    assert re.match(r"12 tokens, [\d.]+ tok/s \| first token [\d.]+ s for \d+ prompt tokens \| hits [\d.]+%", stats)
    assert re.match(r"memory: peak .* planned .* budget 4.00 GiB$", memory)
    piped = succeed("generate", "--prompt", "-", *options, stdin="def f(x):")
    assert piped.stdout == result.stdout


def test_generate_as_json() -> None:
    options = ("--max-new-tokens", 8, "--temperature", "0.9", "--seed", 3, "--expert-slots", 48, *RAM, "--json")
    result = succeed("generate", "--prompt", "import", *options)
    record = last_json(result.stdout)
    assert len(result.stdout.splitlines()) == 1 and result.stderr == ""
    assert len(record["token_ids"]) <= 8 and isinstance(record["text"], str)
    assert record["finish_reason"] in ("length", "stop")
    assert record["stats"]["new_tokens"] >= 1 and record["engine"]["experts_cached"] == 48
    assert last_json(succeed("generate", "--prompt", "import", *options).stdout)["token_ids"] == record["token_ids"]


def test_generate_stops_at_each_stop_text() -> None:
    options = ("--max-new-tokens", 40, "--temperature", 0, *RAM, "--json", "--prompt", "def f(x):")
    text = last_json(succeed("generate", *options).stdout)["text"]
    word = max(text.split(), key=len)
    record = last_json(succeed("generate", *options, "--stop", "\x00never", "--stop", word).stdout)
    assert (record["text"], record["finish_reason"]) == (text[: text.index(word)], "stop")


def test_inspect(tiny: Path) -> None:
    found = inspect_checkpoint(tiny)
    assert last_json(succeed("inspect", tiny, "--json").stdout) == json.loads(json.dumps(found.as_dict()))
    result = succeed("inspect", tiny)
    lines = dict(re.split(r"  +", line, maxsplit=1) for line in result.stdout.splitlines()[1:])
    assert lines["architecture"] == "Qwen3MoeForCausalLM (qwen3_moe)"
    assert lines["experts"] == "8 a layer, top-2; 16 in all"
    assert f"({found.expert_bytes} bytes)" in lines["one expert"]
    assert result.stderr == ""
    assert succeed("inspect").stdout.startswith("demo_model\n")


def test_verify_passes() -> None:
    result = succeed("verify", "--max-new-tokens", 4, *RAM)
    lines = result.stdout.splitlines()
    assert [int(line.split()[0]) for line in lines[:3]] == [4, 48, 192]
    assert all("ids equal" in line for line in lines[:3])
    assert lines[3:] == ["cached output equals uncached output"]


def test_verify_as_json_and_without_a_tokenizer(tiny: Path) -> None:
    record = last_json(succeed("verify", tiny, "--max-new-tokens", 3, *RAM, "--json").stdout)
    assert record["passed"] is True and [size["slots"] for size in record["sizes"]] == [2, 4, 16]
    assert all(size["passed"] and size["ids_equal"] for size in record["sizes"])


def corrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every expert that the cache reads has a page of zeros; the oracle reads by another way."""
    read_piece = DiskTier._read_piece

    def read(disk: DiskTier, run: Any, begin: int, slot: memoryview) -> None:
        read_piece(disk, run, begin, slot)
        slot[run.slot_offset + 4096 : run.slot_offset + 8192] = bytes(4096)

    monkeypatch.setattr(DiskTier, "_read_piece", read)


def test_verify_fails_on_corrupt_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    corrupt(monkeypatch)
    result = invoke("verify", "--max-new-tokens", 4, "--pack", "off", *RAM)
    assert result.exit_code == 1
    assert result.stdout.splitlines()[-1] == "cached output DIFFERS from uncached output"
    result = invoke("verify", "--max-new-tokens", 4, "--pack", "off", *RAM, "--json")
    record = last_json(result.stdout)
    assert result.exit_code == 1 and record["passed"] is False
    assert not any(size["passed"] for size in record["sizes"])


BENCH_KEYS = {
    "load_s", "prefill_tok_per_s", "decode_tok_per_s", "ttft_s", "peak_rss_growth_bytes", "disk_bytes_per_token",
    "hit_rate", "hits", "misses", "experts_cached", "settings",
}  # fmt: skip


@pytest.mark.parametrize("as_json", [(), ("--json",)])
def test_bench_ends_with_one_json_object(as_json: tuple[str, ...]) -> None:
    result = succeed("bench", "--prefill", 16, "--decode", 6, "--expert-slots", 48, *RAM, *as_json)
    record = last_json(result.stdout)
    table = [line.split("  ")[0] for line in result.stderr.splitlines()]
    assert ("decode" in table) is not bool(as_json)
    assert record.keys() >= BENCH_KEYS
    numbers = {name: record[name] for name in BENCH_KEYS - {"settings"}}
    assert all(isinstance(value, (int, float)) and value >= 0 for value in numbers.values()), numbers
    assert record["load_s"] > 0 and record["decode_tok_per_s"] > 0 and record["prefill_tok_per_s"] > 0
    assert (record["prompt_tokens"], record["new_tokens"], record["experts_cached"]) == (16, 6, 48)
    # Five steps after the first token: six layers, four experts each.
    assert record["hits"] + record["misses"] == 5 * 6 * 4
    assert record["hit_rate"] == pytest.approx(record["hits"] / 120, abs=1e-4)
    settings = record["settings"]
    assert settings["expert_slots"] == 48 and settings["ram_bytes"] == 4 << 30
    assert settings["io_used"] in ("direct", "buffered")
    assert settings["offmoe"] == offmoe.__version__ and settings["torch"] == torch.__version__


def test_bench_goes_through_the_ids_that_are_given(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Teacher-forced: the model sees the ids of the file, whatever it would have said."""
    from offmoe.engine import step

    seen: list[int] = []
    forward = step.Forward.__call__

    def record(self: Any, ids: torch.Tensor) -> torch.Tensor:
        seen.extend(ids[0].tolist())
        return forward(self, ids)

    monkeypatch.setattr(step.Forward, "__call__", record)
    monkeypatch.setenv("OFFMOE_DECODE", "eager")  # the fused step passes the model's forward by
    ids = [(13 * i) % 120 + 3 for i in range(20)]
    path = tmp_path / "ids.json"
    path.write_text(json.dumps(ids))
    record_all = last_json(succeed("bench", tiny, "--ids", path, "--prefill", 8, *RAM).stdout)
    assert (record_all["prompt_tokens"], record_all["new_tokens"]) == (8, 12)
    assert seen == ids[:19], "the last id is only predicted"
    seen.clear()
    record_warm = last_json(succeed("bench", tiny, "--ids", path, "--prefill", 8, "--warm", *RAM).stdout)
    assert record_warm["settings"]["warm"]
    assert seen == [*ids[:19], *ids[:19]]
    seen.clear()
    record_some = last_json(succeed("bench", tiny, "--ids", path, "--prefill", 8, "--decode", 4, *RAM).stdout)
    assert (record_some["new_tokens"], seen) == (4, ids[:11])


def test_demo() -> None:
    result = succeed("demo", "--max-new-tokens", 12, "--prompt", "import os\n")
    assert result.stdout.startswith("import os\n")
    assert re.search(
        r"48 of 192 experts of .* were in memory \(25.0%\); \d+ of \d+ look-ups hit; .* read", result.stderr
    )
    record = last_json(succeed("demo", "--max-new-tokens", 12, "--prompt", "import os\n", "--json").stdout)
    assert record["text"].rstrip("\n") == result.stdout.rstrip("\n")
    assert record["engine"]["experts_cached"] == 48


def test_chat_of_piped_lines() -> None:
    result = succeed("chat", "--max-new-tokens", 6, *RAM, stdin="hello\n\n/exit\nnever read\n")
    assert len([line for line in result.stderr.splitlines() if " tok/s | first token " in line]) == 1
    assert "> " not in result.stdout and "/exit leaves" not in result.stderr
    two = succeed("chat", "--max-new-tokens", 6, *RAM, stdin="hello\nand more")
    stats = [line for line in two.stderr.splitlines() if " prompt tokens" in line]
    prompt_tokens = [int(re.findall(r"for (\d+) prompt", line)[0]) for line in stats]
    assert len(prompt_tokens) == 2 and prompt_tokens[1] > prompt_tokens[0], "the second turn knows the first"


def test_chat_sends_the_system_message() -> None:
    def prompt_tokens(*options: str) -> int:
        result = succeed("chat", "--max-new-tokens", 2, *RAM, *options, stdin="hello\n")
        return int(re.findall(r"for (\d+) prompt", result.stderr)[0])

    assert prompt_tokens("--system", "Answer in Latin.") > prompt_tokens()


def test_plain_text_when_piped(tiny: Path) -> None:
    for result in (
        succeed("demo", "--max-new-tokens", 3), succeed("inspect"), succeed("--help"),
        succeed("bench", tiny, "--prefill", 4, "--decode", 2, *RAM), succeed("verify", tiny, *RAM),
        succeed("chat", "--max-new-tokens", 3, *RAM, stdin="hello\n"),
    ):  # fmt: skip
        assert "\x1b" not in result.output and "\r" not in result.output


def test_a_failed_read_is_one_line(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: Any, **options: Any) -> None:
        raise offmoe.core.errors.DiskReadError("reading model.safetensors at byte 0 failed: Input/output error")

    monkeypatch.setattr(DiskTier, "_read_piece", failing)
    assert "model.safetensors" in fail("bench", tiny, "--prefill", 4, "--decode", 2, *RAM)
