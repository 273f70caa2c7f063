"""Where a reply ends: end tokens from every place that names them, stop strings through control tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from engines import open_tiny
from families import build, save_layout
from makers import one_line
from small_tokenizers import byte_level, sentencepiece
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import GenerationConfig, PreTrainedTokenizerFast

import offmoe
from offmoe.core.errors import UsageError
from offmoe.engine.ends import end_ids
from offmoe.engine.prompt import stop_rules

HARMONY = ("<|endoftext|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>")


def save_with(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny model whose embedding has 512 rows, and a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    save_layout(build("qwen3_moe", overrides={"vocab_size": 512}), folder, "published")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bytes_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[offmoe.Engine]:
    with open_tiny(save_with(tmp_path_factory.mktemp("bytes"), byte_level())) as engine:
        yield engine


@pytest.fixture(scope="module")
def pieces_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[offmoe.Engine]:
    with open_tiny(save_with(tmp_path_factory.mktemp("pieces"), sentencepiece())) as engine:
        yield engine


def said(engine: offmoe.Engine, ids: Sequence[int], prompt: Any = "x", **options: Any) -> offmoe.Reply:
    """The reply of a model that writes `ids`."""
    given = iter(ids)
    return engine.generate(prompt, max_new_tokens=len(ids), choose=lambda _, __: next(given), **options)


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def named(tokenizer: Any, *names: str) -> set[int]:
    return {tokenizer.convert_tokens_to_ids(name) for name in names}


def test_ends_are_those_of_all_places() -> None:
    tokenizer = byte_level()
    end, turn = named(tokenizer, "<|endoftext|>"), named(tokenizer, "<|im_end|>")
    assert end_ids(GenerationConfig(eos_token_id=[7, 9]), {}, tokenizer) == {7, 9} | end | turn
    assert end_ids(None, {}, tokenizer) == end | turn
    start = next(iter(named(tokenizer, "<|im_start|>")))
    for config in ({"eos_token_id": start}, {"text_config": {"eos_token_id": [start]}},
                   {"thinker_config": {"text_config": {"eos_token_id": start}}}):  # fmt: skip
        assert end_ids(GenerationConfig(), config, tokenizer) == end | turn | {start}
    assert end_ids(GenerationConfig(eos_token_id=3), {"eos_token_id": 5}, None) == {3, 5}


def test_an_id_of_the_config_that_stands_for_text_is_no_end() -> None:
    tokenizer = byte_level()
    assert 2 not in end_ids(GenerationConfig(), {"eos_token_id": 2}, tokenizer), "a base model's default"
    assert 2 in end_ids(GenerationConfig(eos_token_id=2), {}, tokenizer)


def test_the_end_of_a_channel_is_not_the_end() -> None:
    tokenizer = byte_level(special=HARMONY)
    assert end_ids(None, {}, tokenizer) == named(tokenizer, "<|endoftext|>", "<|return|>", "<|call|>")
    phi = byte_level(special=("<|endoftext|>", "<|user|>", "<|end|>"))
    assert end_ids(None, {}, phi) == named(phi, "<|endoftext|>", "<|end|>")


def test_a_reply_ends_where_only_the_tokenizer_knows(bytes_engine: offmoe.Engine) -> None:
    """The generation config of this model names no end."""
    tokenizer = bytes_engine.tokenizer
    ids = ids_of(tokenizer, "Hello world<|im_end|>\n<|im_start|>user\nhi")
    reply = said(bytes_engine, ids)
    assert (reply.text, reply.finish_reason) == ("Hello world", "stop")
    assert said(bytes_engine, ids, ignore_eos=True).text == "Hello world\nuser\nhi"


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("<|im_start|>", "Hello\n"), ("\n<|im_start|>us", "Hello"), ("lo\n<|im_start|>", "Hel"),
        ("<|im_start|>user\nhi<|im_end|>", "Hello\n"), ("er", "Hello\nus"),
        ("<|im_start|>system", "Hello\nuser\nhi there"),
    ],
)  # fmt: skip
def test_stop_strings_see_control_tokens(bytes_engine: offmoe.Engine, stop: str, text: str) -> None:
    ids = ids_of(bytes_engine.tokenizer, "Hello\n<|im_start|>user\nhi<|im_end|> there")
    reply = said(bytes_engine, ids, stop=stop, ignore_eos=True)
    assert (reply.text, reply.finish_reason) == (text, "length" if "system" in stop else "stop")


@pytest.mark.parametrize("stop", ["", "\ud800", "a\udcff"])
def test_no_text_is_no_stop(bytes_engine: offmoe.Engine, stop: str) -> None:
    with pytest.raises(UsageError, match=r"not empty|not valid Unicode") as caught:
        bytes_engine.generate("x", stop=stop)
    one_line(caught)


def test_a_stop_that_the_vocabulary_cannot_write_is_refused() -> None:
    words = Tokenizer(WordLevel({"<unk>": 0, "hello": 1, "world": 2, "!": 3}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")

    def rules(stop: str, of: PreTrainedTokenizerFast) -> None:
        stop_rules(
            num_prompt=1, context_length=9, max_new_tokens=2, stop=(stop,), end_ids=frozenset(),
            stop_token_ids=frozenset(), tokenizer=of,
        )  # fmt: skip

    rules("hello world!", tokenizer)
    with pytest.raises(UsageError, match=r"'hello\?', and the model's vocabulary cannot write '\?'") as caught:
        rules("hello?", tokenizer)
    one_line(caught)
    for of in (byte_level(), sentencepiece()):
        rules("字 ?\n\t🦜", of)


def test_a_continuation_begins_with_its_space(pieces_engine: offmoe.Engine) -> None:
    tokenizer: Any = pieces_engine.tokenizer
    prompt, whole = tokenizer("Hello")["input_ids"], tokenizer("Hello world again")["input_ids"]
    assert whole[: len(prompt)] == prompt
    rest = whole[len(prompt) :]
    assert said(pieces_engine, rest, "Hello").text == " world again"
    assert said(pieces_engine, rest, prompt).text == " world again", "ids continue a text as well"
    assert said(pieces_engine, rest, "Hello", own_text=True).text == "world again"
    assert said(pieces_engine, rest, [1]).text == "world again", "there was no text yet"


def test_a_letter_that_the_prompt_began_is_completed(pieces_engine: offmoe.Engine) -> None:
    tokenizer: Any = pieces_engine.tokenizer
    whole = tokenizer("Hello 字字!")["input_ids"]
    cut = tokenizer.convert_ids_to_tokens(whole).index("<0x97>")
    assert said(pieces_engine, whole[cut:], whole[:cut]).text == "字字!"


def test_letters_spelt_in_bytes_stay_whole(pieces_engine: offmoe.Engine) -> None:
    text = "One " + "字🦜é" * 10 + " and the end" + "字" * 25
    reply = said(pieces_engine, ids_of(pieces_engine.tokenizer, text), own_text=True)
    assert (reply.text, reply.finish_reason) == (text, "length")
    assert len(reply.token_ids) > 2 * 64, "several windows of the decoder that was here before"


def test_bytes_that_are_no_letter_do_not_spoil_those_before(pieces_engine: offmoe.Engine) -> None:
    tokenizer: Any = pieces_engine.tokenizer
    stray = tokenizer.convert_tokens_to_ids("<0x97>")
    ids = [*ids_of(tokenizer, "字字"), stray, *ids_of(tokenizer, "字")[1:], *ids_of(tokenizer, "lo")[1:]]
    text = said(pieces_engine, ids, own_text=True).text
    assert text.startswith("字字") and "\ufffd" in text and text.endswith("lo")


def test_text_of_a_token_without_a_row_is_refused(tmp_path: Path) -> None:
    folder = save_with(tmp_path, byte_level())
    with open_tiny(folder) as engine:
        tokenizer: Any = engine.tokenizer
        tokenizer.add_tokens([f"<extra_{i}>" for i in range(200)])
        last = len(tokenizer) - 1
        for call in (engine.generate, lambda text: engine.chat([{"role": "user", "content": text}])):
            with pytest.raises(UsageError, match=f"'<extra_199>', token {last} of .* has 512 rows") as caught:
                call("say <extra_199> now")
            one_line(caught)
