"""Ids to text as they come: characters cut across tokens, stop strings cut across pieces."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import offmoe
from offmoe.checkpoint.locate import demo_model_folder
from offmoe.core.errors import UsageError
from offmoe.engine.text import StopMatcher, TextDecoder

TEXT = "Grüße aus 東京 — naïve ☃ and 🦜🦜, then plain words until the end of it all."


@pytest.fixture(scope="module")
def engine() -> Iterator[offmoe.Engine]:
    with offmoe.load(ram="4GiB") as engine:
        yield engine


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(demo_model_folder())


def run_stops(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    matcher = StopMatcher(stops)
    shown = []
    for piece in pieces:
        shown.append(matcher.add(piece))
        if matcher.met is not None:
            return "".join(shown), True
    return "".join([*shown, matcher.flush()]), False


few = st.text(alphabet="ab", max_size=4)
stop_texts = st.text(alphabet="ab", min_size=1, max_size=4)


@given(stop_texts, st.lists(few, max_size=8))
def test_one_stop_string_cuts_where_it_first_stands(stop: str, pieces: list[str]) -> None:
    text = "".join(pieces)
    assert run_stops([stop], pieces) == (text.split(stop)[0], stop in text)


@given(st.lists(stop_texts, max_size=3), st.lists(few, max_size=8))
def test_no_part_of_a_stop_string_is_ever_shown(stops: list[str], pieces: list[str]) -> None:
    text = "".join(pieces)
    shown, stopped = run_stops(stops, pieces)
    assert stopped == any(stop in text for stop in stops)
    assert not any(stop in shown for stop in stops)
    if stopped:
        assert any(text[len(shown) :].startswith(stop) for stop in stops)
    else:
        assert shown == text


@given(stop_texts, st.lists(few, max_size=8))
def test_text_waits_no_longer_than_it_must(stop: str, pieces: list[str]) -> None:
    matcher = StopMatcher([stop])
    shown = text = ""
    for piece in pieces:
        shown, text = shown + matcher.add(piece), text + piece
        if matcher.met is not None:
            return
        assert stop.startswith(text[len(shown) :]), "what is held back begins a stop string"


@given(st.lists(st.integers(0, 4095), max_size=150))
def test_pieces_of_any_ids_join_to_their_text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> None:
    decoder = TextDecoder(tokenizer)
    pieces = [decoder.add(token_id) for token_id in ids]
    assert "".join([*pieces, decoder.flush()]) == tokenizer.decode(ids, skip_special_tokens=True)


def test_characters_are_never_cut(engine: offmoe.Engine) -> None:
    assert engine.tokenizer is not None
    ids = list(engine.tokenizer(TEXT)["input_ids"])
    given_ids = iter(ids)
    pieces = [
        piece.text
        for piece in engine.stream("x", max_new_tokens=len(ids), choose=lambda _, __: next(given_ids), ignore_eos=True)
    ]
    assert "".join(pieces) == TEXT and not any("\ufffd" in piece for piece in pieces)
    assert len([piece for piece in pieces if piece]) < len(ids), "some characters here are several tokens"


def stopped_reply(engine: offmoe.Engine, stop: str | list[str]) -> offmoe.Reply:
    assert engine.tokenizer is not None
    ids = list(engine.tokenizer(TEXT)["input_ids"])
    given_ids = iter(ids)
    return engine.generate(
        "x", max_new_tokens=len(ids), choose=lambda _, __: next(given_ids), stop=stop, ignore_eos=True
    )


@pytest.mark.parametrize("stop", ["G", "aus", "ords unt", "🦜, t", ".", TEXT, TEXT[5:40]])
def test_a_stop_string_ends_the_reply(engine: offmoe.Engine, stop: str) -> None:
    reply = stopped_reply(engine, stop)
    assert (reply.text, reply.finish_reason) == (TEXT[: TEXT.index(stop)], "stop")


def test_the_first_of_several_stop_strings_ends_it(engine: offmoe.Engine) -> None:
    assert stopped_reply(engine, ["zebra", "plain", "naïve"]).text == TEXT[: TEXT.index("naïve")]
    reply = stopped_reply(engine, ["zebra", "all. And"])
    assert (reply.text, reply.finish_reason) == (TEXT, "length"), "what was held back comes at the end"


@pytest.mark.parametrize("stop", ["", ["a", ""], 3, [3], {"a": 1}, b"x"])
def test_stop_is_a_text_or_a_list_of_texts(engine: offmoe.Engine, stop: object) -> None:
    with pytest.raises(UsageError, match="stop is"):
        engine.generate("x", stop=stop)
