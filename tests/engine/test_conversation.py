"""Chats from Python: what is remembered, what is reused, reasoning told from answers, files."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from makers import one_line
from transformers import AddedToken

import offmoe
from offmoe.chat.messages import chat_ids
from offmoe.chat.reasoning import ChannelSplitter, Splitter, TagSplitter
from offmoe.core.errors import OutputError, UsageError
from offmoe.engine.conversation import Conversation
from offmoe.engine.reasoning import split_reasoning
from offmoe.engine.stream import Chunk, Stream

SHORT: dict[str, Any] = {"max_new_tokens": 6, "ignore_eos": True}


@pytest.fixture(scope="module")
def engine() -> Iterator[offmoe.Engine]:
    with offmoe.load(ram="4GiB", expert_slots=48) as engine:
        yield engine


def parts_of(splitter: Splitter, text: str, size: int) -> list[tuple[bool, str]]:
    """What comes of `text` in pieces of `size` characters, neighbours of a kind joined."""
    parts = [part for i in range(0, len(text), size) for part in splitter.add(text[i : i + size])] + splitter.flush()
    joined: list[tuple[bool, str]] = []
    for reasoning, part in parts:
        assert part
        if joined and joined[-1][0] == reasoning:
            joined[-1] = (reasoning, joined[-1][1] + part)
        else:
            joined.append((reasoning, part))
    return joined


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("<think>\nWell: 1 < 2.\n</think>\n\nYes.", [(True, "Well: 1 < 2.\n"), (False, "Yes.")]),
        ("\n<think>a</think>b <think>c</think>", [(True, "a"), (False, "b <think>c</think>")]),
        ("<think></think>\n\nb", [(False, "b")]),
        ("<think>cut off </thi", [(True, "cut off </thi")]),
        ("[THINK]a[/THINK]b", [(True, "a"), (False, "b")]),
        ("Use <think> tags", [(False, "Use <think> tags")]),
        ("  <thin air", [(False, "  <thin air")]),
        ("<thi", [(False, "<thi")]),
        ("\n\nplain", [(False, "\n\nplain")]),
        ("", []),
    ],
)
def test_blocks_of_reasoning(text: str, parts: list[tuple[bool, str]], size: int) -> None:
    assert parts_of(TagSplitter(), text, size) == parts


@pytest.mark.parametrize("size", [1, 5, 100])
def test_a_block_that_the_prompt_opened(size: int) -> None:
    splitter = TagSplitter(inside=("<think>", "</think>"))
    assert parts_of(splitter, "\nhm</think>\n\n4", size) == [(True, "hm"), (False, "4")]


@pytest.mark.parametrize("size", [1, 4, 11, 200])
@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (
            "<|channel|>analysis<|message|>Let me see.<|end|><|start|>assistant<|channel|>final<|message|>It is 4.",
            [(True, "Let me see."), (False, "It is 4.")],
        ),
        ("<|channel|>final<|message|>4", [(False, "4")]),
        ("<|channel|>commentary to=f <|constrain|>json<|message|>{}", [(True, "{}")]),
        ("no channels <| at all", [(False, "no channels <| at all")]),
        ("<|channel|>analysis<|message|>cut <|en", [(True, "cut <|en")]),
    ],
)
def test_channels(text: str, parts: list[tuple[bool, str]], size: int) -> None:
    assert parts_of(ChannelSplitter(), text, size) == parts


def test_marks_that_are_special_tokens_are_seen(engine: offmoe.Engine) -> None:
    """Decoding leaves them out of the text."""
    tokenizer = copy.deepcopy(engine.tokenizer)
    assert tokenizer is not None
    tokenizer.add_tokens([AddedToken(mark, special=True) for mark in ("[THINK]", "[/THINK]")], special_tokens=True)
    begin, end = (tokenizer.convert_tokens_to_ids(mark) for mark in ("[THINK]", "[/THINK]"))
    given = [Chunk("", (begin,)), Chunk("a", (50,)), Chunk("", (end,)), Chunk("b", (51,)), Chunk("", (), "stop")]
    pieces = list(split_reasoning(Stream(piece for piece in given), tokenizer, [7]))
    assert [(piece.text, piece.reasoning) for piece in pieces if piece.text] == [("a", True), ("b", False)]
    assert [id_ for piece in pieces for id_ in piece.token_ids] == [begin, 50, end, 51]
    assert pieces[-1].finish_reason == "stop"
    opened = split_reasoning(Stream(piece for piece in given[1:]), tokenizer, [7, begin])
    assert [(piece.text, piece.reasoning) for piece in opened if piece.text] == [("a", True), ("b", False)]


def test_a_second_turn_reads_only_what_is_new(engine: offmoe.Engine) -> None:
    chat = engine.conversation(system="Be brief.")
    first = chat.ask("What is a list?", **SHORT)
    assert first.reasoning == "" and first.text
    before = engine.stats()
    second = chat.ask("And a dict?", **SHORT)
    after = engine.stats()
    assert engine.tokenizer is not None
    whole = chat_ids(engine.tokenizer, chat.messages[:-1])
    assert second.stats.prompt_tokens == len(whole)
    num_read = after["prefilled_tokens"] - before["prefilled_tokens"]
    assert num_read == second.stats.prompt_tokens - second.stats.reused_tokens
    # What was said last and was never read, the end of that turn, and the question.
    assert 0 < num_read <= len(whole) - first.stats.prompt_tokens - len(first.token_ids) + 2
    assert second.stats.prefill.lookups <= num_read * 6 * 4, "six layers, top-4"
    assert [message["role"] for message in chat.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert chat.num_turns == 2 and chat.num_tokens() > len(whole)


def test_two_conversations_share_an_engine(engine: offmoe.Engine) -> None:
    one, two = engine.conversation(), engine.conversation(system="Be kind.")
    expected = [engine.conversation().ask("Count to three.", **SHORT, reuse=False).text]
    expected += [engine.conversation(system="Be kind.").ask("Hello", **SHORT, reuse=False).text]
    assert [one.ask("Count to three.", **SHORT).text, two.ask("Hello", **SHORT).text] == expected
    assert one.messages[0]["content"] == "Count to three."


def test_a_closed_stream_is_remembered_as_far_as_it_came(engine: offmoe.Engine) -> None:
    chat = engine.conversation()
    pieces = chat.stream("Count.", max_new_tokens=50, ignore_eos=True)
    said = "".join(next(pieces).text for _ in range(5))
    pieces.close()
    assert chat.messages[1:] == [{"role": "assistant", "content": said}]
    unheard = chat.stream("More.", max_new_tokens=5)
    unheard.close()
    assert chat.num_turns == 1, "nothing was answered"


def test_retry_replaces_the_last_exchange(engine: offmoe.Engine) -> None:
    chat = engine.conversation()
    with pytest.raises(UsageError, match="nothing was asked"):
        chat.retry()
    first = chat.ask("Count.", **SHORT, temperature=0)
    again = list(chat.retry(**SHORT, temperature=0))
    assert "".join(piece.text for piece in again) == first.text, "to the bit: it starts from the same logits"
    stats = again[-1].stats
    assert stats is not None and stats.reused_tokens == stats.prompt_tokens
    assert chat.num_turns == 1 and chat.last_question() == "Count."


def test_system_and_reset(engine: offmoe.Engine) -> None:
    chat = engine.conversation(system="One.")
    chat.ask("Hi", **SHORT)
    chat.system = "Two."
    assert (chat.system, len(chat.messages)) == ("Two.", 3)
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "Two."}]
    chat.system = None
    assert (chat.messages, chat.system, chat.num_tokens()) == ([], None, 0)


def test_saved_and_loaded(engine: offmoe.Engine, tmp_path: Path) -> None:
    chat = engine.conversation(system="Grüße")
    chat.ask("Hi", **SHORT)
    for _ in range(2):
        chat.save(tmp_path / "chat.json")
    other = engine.conversation()
    other.load(tmp_path / "chat.json")
    assert other.messages == chat.messages
    assert [path.name for path in tmp_path.iterdir()] == ["chat.json"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\x80\x81", "not JSON text"), (b"hello", "not JSON text"), (b"[" * 100_000, "not JSON text"),
        (b"{}", "lacks"), (b'{"offmoe_conversation": 1, "messages": 3}', "lacks"),
        (b'{"offmoe_conversation": 1, "messages": [{"role": "pirate", "content": "arr"}]}', "no message"),
        (b'{"offmoe_conversation": 1, "messages": [{"role": "user", "content": "\\ud800"}]}', "not valid Unicode"),
    ],
)  # fmt: skip
def test_files_that_are_no_conversation(engine: offmoe.Engine, tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "mine.txt"
    path.write_bytes(content)
    chat = engine.conversation(system="kept")
    with pytest.raises(UsageError, match=says) as caught:
        chat.load(path)
    one_line(caught)
    with pytest.raises(UsageError, match="choose another name"):
        chat.save(path)
    assert path.read_bytes() == content and chat.system == "kept"


def test_places_that_cannot_be_written_or_read(engine: offmoe.Engine, tmp_path: Path) -> None:
    chat = engine.conversation(system="kept")
    with pytest.raises(OutputError, match="No such file") as caught:
        chat.save(tmp_path / "no" / "chat.json")
    one_line(caught)
    with pytest.raises(UsageError, match="No such file"):
        chat.load(tmp_path / "none.json")
    huge = tmp_path / "huge.json"
    with huge.open("wb") as file:
        file.truncate(65 << 20)
    with pytest.raises(UsageError, match="too many"):
        chat.load(huge)
    (tmp_path / "ok.json").write_text(json.dumps({"offmoe_conversation": 1, "messages": []}))
    chat.load(tmp_path / "ok.json")
    assert chat.messages == [] and repr(chat) == "<Conversation [0 messages]>"
    assert isinstance(chat, Conversation)


def stop_before_the_first_word(pieces: Stream) -> None:
    """As Ctrl-C while the prompt is read."""
    with pytest.raises(KeyboardInterrupt):
        next(pieces)


def interrupt(done: int, total: int) -> None:
    raise KeyboardInterrupt


def test_retry_answers_the_question_that_was_stopped(engine: offmoe.Engine) -> None:
    chat = engine.conversation()
    stop_before_the_first_word(chat.stream("Count.", **SHORT, on_prefill=interrupt))
    assert chat.messages == [] and chat.last_question() == "Count."
    list(chat.retry(**SHORT, temperature=0))
    answered = list(chat.messages)
    assert [message["role"] for message in answered] == ["user", "assistant"] and answered[0]["content"] == "Count."
    stop_before_the_first_word(chat.stream("More?", **SHORT, on_prefill=interrupt))
    assert chat.messages == answered, "the good answer stays"
    stop_before_the_first_word(chat.retry(**SHORT, on_prefill=interrupt))
    assert chat.messages == answered and chat.last_question() == "More?"
    list(chat.retry(**SHORT, temperature=0))
    assert chat.messages[:3] == [*answered, {"role": "user", "content": "More?"}] and len(chat.messages) == 4
    stop_before_the_first_word(chat.retry(**SHORT, on_prefill=interrupt, reuse=False))
    assert len(chat.messages) == 4 and chat.last_question() == "More?", "a retry that was stopped takes nothing away"
    stop_before_the_first_word(chat.stream("Gone?", **SHORT, on_prefill=interrupt))
    chat.reset()
    with pytest.raises(UsageError, match="nothing was asked"):
        chat.retry()


def test_a_message_that_was_begun_is_gone_on_with(engine: offmoe.Engine) -> None:
    asked = [{"role": "user", "content": "hello"}]
    begun = [*asked, {"role": "assistant", "content": "Good morning to"}]
    ids = engine.tokenize_chat(begun, continue_final_message=True)
    assert engine.tokenizer is not None
    assert engine.tokenizer.decode(ids).endswith("Good morning to")
    assert ids[: len(engine.tokenize_chat(asked))] == engine.tokenize_chat(asked)
    stream = engine.stream_chat(begun, continue_final_message=True, raw=True, max_new_tokens=3)
    assert stream.prompt_ids == tuple(ids) and list(stream)
    for wrong in (asked, [*asked, {"role": "assistant", "content": " "}]):
        with pytest.raises(UsageError, match="continue_final_message"):
            engine.tokenize_chat(wrong, continue_final_message=True)
    assert engine.tokenize("hello") == engine.tokenizer("hello")["input_ids"]
