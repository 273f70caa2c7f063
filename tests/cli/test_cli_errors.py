"""Mistakes on the command line: one `error: ...` line on stderr, nothing on stdout, exit code 2, and told at once."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from commands import COMMANDS, TIMEOUT_S, command_line, environment, fail, invoke, last_json, run
from damage import edit_file
from engines import leaves_nothing, save_tiny

# `list`, `pull` and `rm` are about names of the hub.
WITH_MODEL = [command for command in COMMANDS if command not in {"demo", "replay", "list", "pull", "rm"}]
# What a command needs besides a model.
NEEDED = {
    "generate": ("--prompt", "x"), "quantize": ("never-written", "--expert-format", "int4"),
    "trace": ("--prompts", __file__, "-o", "never-written"),
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without a tokenizer, for prompts of at most 256 tokens."""
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    with leaves_nothing():
        yield


@pytest.mark.parametrize("command", COMMANDS)
def test_unknown_flags(command: str) -> None:
    text = fail(command, "--fast")
    assert "no such option '--fast'" in text and text.endswith(f"see offmoe {command} --help")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--fast",), ("no such option '--fast'", "see offmoe --help")),
        (("fly",), ("no such command 'fly'", "see offmoe --help")),
        (("generate",), ("missing option '-p' / '--prompt'", "see offmoe generate --help")),
        (("inspect", "a", "b"), ("unexpected extra argument", "see offmoe inspect --help")),
        (("demo", "a"), ("unexpected extra argument",)),
        (("demo", "--max-new-tokens", "0"), ("--max-new-tokens", "x>=1")),
        (("bench", "--prefill", "0"), ("--prefill", "x>=1")),
        (("bench", "--decode", "1"), ("--decode", "x>=2")),
        (("generate", "--prompt"), ("--prompt", "requires an argument")),
        (("generate", "--prompt", "x", "--max-new-tokens", "many"), ("--max-new-tokens", "'many'")),
        (("generate", "--prompt", "x", "--temperature", "-1"), ("--temperature", "-1", "x>=0")),
        (("generate", "--prompt", "x", "--top-p", "1.5"), ("--top-p", "0<x<=1")),
        (("generate", "--prompt", "x", "--top-k", "1.5"), ("--top-k", "1.5")),
        (("generate", "--prompt", "x", "--min-p", "2"), ("--min-p", "0<=x<=1")),
        (("generate", "--prompt", "x", "--repetition-penalty", "0"), ("--repetition-penalty", "x>0")),
        (("chat", "--seed", "-4"), ("--seed", "x>=0")),
        (("chat", "--ram", "lots"), ("ram is 'lots'", '"6GiB"')),
        (("generate", "--prompt", "x", "--context-length", "0"), ("context_length is '0'", "at least 1")),
        (("verify", "--expert-slots", "1.5"), ("expert_slots is '1.5'", "whole number")),
        (("verify", "--policy", "random"), ("policy is 'random'", "known: auto, lru")),
        (("chat", "--fast-activations"), ("fast_activations is gone: it was not faster; leave it out",)),
        (("bench", "--io", "fast"), ("io is 'fast'", "known: auto, direct, buffered")),
        (("bench", "--device", "abacus"), ("device is 'abacus'", "known: auto, cpu, cuda, cuda:N")),
        (("generate", "--prompt", "x", "--vram", "much"), ("vram is 'much'", '"6GiB"')),
        (("generate", "--prompt", "x", "--vram", "1GiB", "--device", "cpu"), ("vram is set", "leave out one")),
        (("bench", "--miss", "disk"), ("miss is 'disk'", "known: auto, stream, cpu")),
        (("bench", "--prefetch", "9"), ("prefetch is '9'", "known: auto, off, or how many layers ahead: 1 to 3")),
        (("bench", "--compile", "yes"), ("compile is 'yes'", "known: auto, off, on")),
        (("generate", "--prompt", "x", "--ram", "1MiB"), ("ram is 1.0 MiB", "this model needs", "use --ram")),
        (("generate", "--prompt", "x", "--expert-slots", "3"), ("expert_slots is 3", "use --expert-slots 4")),
        (("generate", "--prompt", "x", "--context-length", "99999"), ("99999", "--context-length 2048")),
        (("generate", "--prompt", ""), ("the prompt is empty",)),
        (("verify", "--prompt", ""), ("the prompt is empty",)),
        (("bench", "--prompt", ""), ("the prompt is empty",)),
        (("generate", "--prompt", "x " * 300, "--context-length", "64"), ("the context 64", "--context-length")),
        (("generate", "--prompt", "x", "--stop", ""), ("stop is",)),
    ],
)
def test_mistakes(args: tuple[str, ...], words: tuple[str, ...]) -> None:
    text = fail(*args)
    for word in words:
        assert word in text


ASKS_FOR_A_DEVICE = [("--device", "cuda"), ("--device", "cuda:3"), ("--vram", "1GiB")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
@pytest.mark.parametrize("flags", ASKS_FOR_A_DEVICE)
@pytest.mark.parametrize("command", ["generate", "chat", "bench", "verify"])
def test_a_device_where_there_is_none(command: str, flags: tuple[str, str]) -> None:
    text = fail(command, *NEEDED.get(command, ()), *flags, "--ram", "4GiB", stdin="")
    assert "CUDA" in text and any(what in text for what in ("install", "look whether"))


@pytest.mark.parametrize("command", WITH_MODEL)
@pytest.mark.parametrize("as_json", [False, True])
def test_no_such_model(command: str, as_json: bool, tmp_path: Path) -> None:
    flags = ("--json",) if as_json and command not in {"chat", "serve"} else ()
    text = fail(command, tmp_path / "nowhere", *NEEDED.get(command, ()), *flags)
    assert text.startswith(f"{tmp_path / 'nowhere'} does not exist")
    (tmp_path / "empty").mkdir()
    assert "no config.json" in fail(command, tmp_path / "empty", *NEEDED.get(command, ()), *flags)


@pytest.mark.parametrize("command", WITH_MODEL)
def test_a_dense_model(command: str, tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
    )
    transformers.LlamaForCausalLM._from_config(config).save_pretrained(tmp_path)
    assert "no experts" in fail(command, tmp_path, *NEEDED.get(command, ()))


@pytest.mark.parametrize("command", WITH_MODEL)
def test_a_truncated_model(command: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)
    edit_file(0, lambda raw: raw[:-1])(folder)
    assert "truncated" in fail(command, folder, *NEEDED.get(command, ()))


@pytest.mark.parametrize(
    ("command", "args"), [("generate", ("--prompt", "x")), ("chat", ()), ("bench", ("--prompt", "x"))]
)
def test_text_for_a_model_without_tokenizer(command: str, args: tuple[str, ...], tiny: Path) -> None:
    assert "no tokenizer" in fail(command, tiny, *args, "--ram", "4GiB", stdin="hello\n")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ("cannot be read: No such file",)),
        ("[1, 2", ("cannot be read as JSON",)),
        ("\xff", ("is no UTF-8 text",)),
        ('{"ids": [1]}', ("no list of token ids", "[1, 2, 3]")),
        ("[1, 2.5, 3]", ("no list of token ids",)),
        ("[1, -2, 3]", ("no list of token ids",)),
        ("[true, 2, 3]", ("no list of token ids",)),
        ("[]", ("--prefill 8 of 0 ids leaves 0",)),
        (json.dumps([5] * 9), ("--prefill 8 of 9 ids leaves 1", "at least 2")),
        (json.dumps([*[5] * 12, 128]), ("token id 128 is not in the vocabulary of 128",)),
        (json.dumps([5] * 300), ("300 ids", "room for 256", "--context-length")),
    ],
)
def test_ids_files(content: str | None, words: tuple[str, ...], tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "ids.json"
    if content is not None:
        path.write_bytes(content.encode("latin-1"))
    text = fail("bench", tiny, "--ids", path, "--prefill", 8, "--ram", "4GiB")
    for word in words:
        assert word in text


def test_ids_and_other_things(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "ids.json"
    path.write_text(json.dumps([5] * 20))
    assert "not both" in fail("bench", tiny, "--ids", path, "--prompt", "x")
    text = fail("bench", tiny, "--ids", path, "--prefill", 15, "--decode", 6, "--ram", "4GiB")
    assert "need 21 ids, there are 20" in text


@pytest.mark.parametrize("args", [("generate", "--prompt", "-"), ("chat",)])
def test_input_that_is_no_text(args: tuple[str, ...]) -> None:
    text = fail(*args, "--ram", "4GiB", stdin=b"caf\xe9 au lait\n")
    assert "text" in text or "Unicode" in text


def test_ctrl_c_while_loading_is_one_line(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("offmoe.loader.load.load_resident", interrupt)
    result = invoke("bench", tiny, "--prefill", 4, "--decode", 2)
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "stopped\n")


IMPORTS = """
import sys
from offmoe.cli.main import main
for args in {runs!r}:
    try:
        main(args)
    except SystemExit as stop:
        heavy = sorted({{"torch", "transformers", "accelerate", "numpy"}} & sys.modules.keys())
        print(f"{{args}}: code {{stop.code}}, imported {{heavy}}", file=sys.stderr)
"""


def test_help_inspect_and_mistakes_import_no_torch(tiny: Path, tmp_path: Path) -> None:
    nowhere = str(tmp_path / "nowhere")
    good = [["--help"], ["--version"], [], ["inspect"], ["inspect", str(tiny), "--json"]]
    bad = [["generate", "--fast"], ["fly"], ["generate"], ["demo", "--seed", "x"], ["chat", str(tmp_path)]]
    bad += [["generate", nowhere, "--prompt", "x"], ["bench", "--ids", nowhere]]
    bad += [[command, "--ram", "lots", *NEEDED.get(command, ())] for command in ("generate", "chat", "bench", "verify")]
    runs = [*good, *([command, "--help"] for command in COMMANDS), *bad]
    result = subprocess.run(
        [*command_line()[:1], "-c", IMPORTS.format(runs=runs)], capture_output=True, text=True, timeout=TIMEOUT_S,
        env=environment(), check=True,
    )  # fmt: skip
    told = [line for line in result.stderr.splitlines() if ", imported " in line]
    assert told == [f"{args}: code {2 if args in bad else 0}, imported []" for args in runs]


def test_the_advised_budget_works_in_a_fresh_process() -> None:
    args = ("generate", "--prompt", "def f(x):", "--max-new-tokens", 3, "--json", "--ram")
    refused = run(*args, "64MiB")
    assert (refused.returncode, refused.stdout) == (2, ""), refused.stderr
    enough = refused.stderr.rpartition("use --ram ")[2].split()[0]
    worked = run(*args, enough)
    assert worked.returncode == 0, worked.stderr
    engine = last_json(worked.stdout)["engine"]
    # Libraries count: the growth is that of the whole process, and stays within what was allowed.
    assert 200 << 20 < engine["peak_rss_growth_bytes"] <= engine["ram_bytes"]


def test_a_reader_that_goes_away() -> None:
    """`offmoe generate | head -c 1` ends without a traceback."""
    args = command_line(
        "generate", "--prompt", "def f(x):", "--max-new-tokens", 2000, "--temperature", 1.5, "--seed", 1
    )
    with subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(1)
        process.stdout.close()
        errors = process.stderr.read().decode()
        assert process.wait(TIMEOUT_S) == 1
    assert "Traceback" not in errors and "error" not in errors.lower()


def test_ctrl_c_while_generating() -> None:
    args = command_line(
        "generate", "--prompt", "def f(x):", "--max-new-tokens", 2000, "--temperature", 1.5, "--seed", 1
    )
    with subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as process:
        assert process.stdout is not None
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 130
    assert output.endswith(b"\n") and errors.splitlines()[-1] == b"stopped" and b"Traceback" not in errors


def test_text_that_the_terminal_cannot_show(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "naïve ☃")
    result = subprocess.run(
        command_line("inspect", folder), capture_output=True, timeout=TIMEOUT_S, check=True,
        env=environment(PYTHONIOENCODING="latin-1"),
    )  # fmt: skip
    assert result.stdout.startswith("naïve ?\n".encode("latin-1"))
