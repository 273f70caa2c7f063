"""Replies in a given form: JSON by a schema, a regular expression, a grammar; a random model cannot leave it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import fail, last_json, succeed
from engines import open_tiny, save_speaking, save_tiny
from small_tokenizers import byte_level

import offmoe
from offmoe.chat.reasoning import ReasoningGate
from offmoe.core.errors import UsageError
from offmoe.sampling import grammar

SCHEMA: dict[str, Any] = {
    "type": "object", "additionalProperties": False, "required": ["age", "kind"],
    "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 99}, "kind": {"enum": ["cat", "dog"]}},
}  # fmt: skip
LARK = 'start: greeting " " name\ngreeting: "Hi" | "Ho"\nname: /[a-c]{2,4}/'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_speaking(tmp_path_factory.mktemp("speaking"))


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[offmoe.Engine]:
    with offmoe.load(folder, ram="4GiB") as engine:
        yield engine


@pytest.mark.parametrize("seed", range(4))
def test_json_by_a_schema(engine: offmoe.Engine, seed: int) -> None:
    reply = engine.generate("x", json_schema=SCHEMA, temperature=1.0, seed=seed, max_new_tokens=200)
    assert reply.finish_reason == "stop"
    value = json.loads(reply.text)
    assert set(value) == {"age", "kind"} and 0 <= value["age"] <= 99 and value["kind"] in {"cat", "dog"}
    text = engine.generate("x", json_schema=json.dumps(SCHEMA), temperature=1.0, seed=seed, max_new_tokens=200).text
    assert text == reply.text


def test_greedy_replies_and_chats_too(engine: offmoe.Engine) -> None:
    assert json.loads(engine.generate("x", json_schema=SCHEMA, temperature=0, max_new_tokens=200).text)
    reply = engine.chat([{"role": "user", "content": "hi"}], regex="[0-9]{3}-[a-f]{2}", temperature=1.0, seed=1)
    assert re.fullmatch("[0-9]{3}-[a-f]{2}", reply.text)


@pytest.mark.parametrize("seed", range(3))
def test_a_regular_expression_and_a_grammar(engine: offmoe.Engine, seed: int) -> None:
    got = engine.generate("x", regex="(ab|cd)+", temperature=1.0, seed=seed, max_new_tokens=12)
    assert re.fullmatch("(ab|cd)+", got.text) or got.finish_reason == "length"
    got = engine.generate("x", grammar=LARK, temperature=1.0, seed=seed)
    assert re.fullmatch("H[io] [a-c]{2,4}", got.text)


def test_any_object(engine: offmoe.Engine) -> None:
    reply = engine.generate("x", json_schema=True, temperature=1.0, seed=3, max_new_tokens=300)
    assert reply.text.startswith("{")
    if reply.finish_reason == "stop":
        assert isinstance(json.loads(reply.text), dict)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"json_schema": {"properties": {"a/b": {"type": "objet"}}}}, r"json_schema: /properties/a~1b: .*objet"),
        ({"json_schema": {"properties": {"a": {"items": {"pattern": "("}}}}}, "json_schema: /properties/a/items: "),
        ({"json_schema": {"properties": 3}}, "json_schema: properties must be"),
        ({"json_schema": {"$ref": "http://127.0.0.1/schema"}}, "json_schema: .*127.0.0.1"),
        ({"json_schema": "{"}, "json_schema is no JSON"), ({"json_schema": "[1]"}, "a schema is an object"),
        ({"json_schema": {"a": {1, 2}}}, "json_schema is no JSON"), ({"json_schema": 3}, "json_schema is 3"),
        ({"regex": "("}, "regex: .*unclosed"), ({"regex": ""}, "regex is ''"),
        ({"grammar": "start: x"}, "grammar: .*unknown name"), ({"grammar": "x" * 300_000}, "300000 characters"),
        ({"regex": "a", "grammar": LARK}, "regex and grammar exclude each other"),
        ({"regex": "a", "ignore_eos": True}, "ignore_eos"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_its_place(engine: offmoe.Engine, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words) as raised:
        engine.stream("x", **options)
    assert "\n" not in str(raised.value)


def test_schemas_that_grow_are_refused_or_taken_at_once(engine: offmoe.Engine) -> None:
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(100):
        deep = {"properties": {"a": deep}}
    with pytest.raises(UsageError, match="nested"):
        engine.stream("x", json_schema=deep)
    for _ in range(5000):
        deep = {"not": deep}
    with pytest.raises(UsageError, match="json_schema"):
        engine.stream("x", json_schema=deep)
    with pytest.raises(UsageError, match="json_schema"):
        engine.stream("x", json_schema='{"a":' * 30_000)
    wide = {"allOf": [{"anyOf": [{"properties": {f"{i}{j}": {"type": "string"}}} for j in range(9)]} for i in range(9)]}
    with pytest.raises(UsageError, match="too large"):
        engine.stream("x", json_schema=wide)
    large = "(a|aa|ab|b){1,800}(c|d|(a|b){1,900}){1,900}z" * 30
    assert engine.generate("x", regex=large, max_new_tokens=40).text[0] in "abcd"


def test_models_without_a_tokenizer_or_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tmp_path)
    with open_tiny(tmp_path) as engine, pytest.raises(UsageError, match="tokenizer"):
        engine.generate([1, 2], regex="a")
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(UsageError, match=r"pip install 'offmoe\[grammar\]'"):
        grammar._library("regex")


def test_the_grammar_begins_behind_the_reasoning() -> None:
    tokenizer = byte_level(special=("<think>", "</think>"))
    ids = {mark: tokenizer.convert_tokens_to_ids(mark) for mark in ("<think>", "</think>", "a")}
    gate = ReasoningGate(tokenizer, [ids["a"]])
    assert gate.openers == {ids["<think>"]} and not gate.is_reasoning
    assert not gate.add(ids["<think>"]) and gate.is_reasoning and not gate.openers
    assert not gate.add(ids["a"]) and not gate.add(ids["</think>"])
    assert not gate.is_reasoning and gate.add(ids["a"])
    at_once = ReasoningGate(tokenizer, [ids["a"]])
    assert at_once.add(ids["a"]) and not at_once.openers
    opened = ReasoningGate(tokenizer, [ids["a"], ids["<think>"]])
    assert opened.is_reasoning and not opened.openers


def test_on_the_command_line(folder: Path, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(SCHEMA))
    asked = ("generate", folder, "--prompt", "x", "--ram", "4GiB", "--max-new-tokens", 200)
    done = succeed(*asked, "--json-schema", schema, "--json")
    assert json.loads(last_json(done.stdout)["text"])["kind"] in {"cat", "dog"}
    assert "none.lark cannot be read" in fail(*asked, "--grammar", tmp_path / "none.lark")
    schema.write_text(" ")
    assert "schema.json is empty" in fail(*asked, "--json-schema", schema)
    schema.write_text('{"properties": {"a": {"type": "objet"}}}')
    assert "json_schema: /properties/a: " in fail(*asked, "--json-schema", schema)
