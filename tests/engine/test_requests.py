"""The options of one request, each with the ids, reasons and numbers that it must give."""

from __future__ import annotations

import dataclasses
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import PROMPT, assert_at_rest, open_tiny, save_tiny
from makers import one_line
from patience import PATIENCE_S
from transformers import LogitsProcessor, PreTrainedModel

import offmoe
from offmoe import SamplingParams, UsageError
from offmoe.sampling.params import REQUEST_NAMES, ChatOptions, RequestOptions, SamplingOptions

NUM_NEW = 16


def greedy(engine: offmoe.Engine, **options: Any) -> offmoe.Reply:
    return engine.generate(PROMPT, **{"max_new_tokens": NUM_NEW, "temperature": 0, "ignore_eos": True, **options})


def test_parameters_as_a_record_are_those_by_name(engine: offmoe.Engine) -> None:
    params = SamplingParams(temperature=0.9, seed=3, top_k=40, max_new_tokens=6)
    wanted = engine.generate(PROMPT, temperature=0.9, seed=3, top_k=40, max_new_tokens=6)
    assert engine.generate(PROMPT, sampling=params).token_ids == wanted.token_ids
    shorter = engine.generate(PROMPT, sampling=params, max_new_tokens=4)
    assert shorter.token_ids == wanted.token_ids[:4], "what is given by name wins"
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.seed = 4  # type: ignore[misc]
    with pytest.raises(UsageError, match=r"sampling is a dict; use offmoe.SamplingParams"):
        engine.generate(PROMPT, sampling={"seed": 3})  # type: ignore[arg-type]


def test_names_and_types_of_keywords_are_those_of_the_record() -> None:
    keywords = {name: getattr(kind, "__forward_arg__", kind) for name, kind in SamplingOptions.__annotations__.items()}
    assert keywords == {field.name: field.type for field in dataclasses.fields(SamplingParams)}
    assert set(REQUEST_NAMES) == RequestOptions.__optional_keys__ and not RequestOptions.__required_keys__
    of_chats = {"chat_template_kwargs", "allow_control_tokens", "continue_final_message"}
    assert of_chats == ChatOptions.__optional_keys__ - set(REQUEST_NAMES)
    for field in dataclasses.fields(SamplingParams):
        (line,) = [
            line for line in str(SamplingParams.__doc__).splitlines() if line.strip().startswith(field.name + " ")
        ]
        assert len(line.strip()) > len(field.name) + 20


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("max_new_tokens", 0, "whole number of at least 1"), ("presence_penalty", 2.5, "between -2 and 2"),
        ("frequency_penalty", "x", "between -2 and 2"), ("stop", [""], "a text that is not empty"),
        ("stop", 7, "a text that is not empty"), ("stop_token_ids", "ab", "a list of token ids"),
        ("stop_token_ids", 5, "a list of token ids"), ("ignore_eos", 1, "True or False"),
        ("logprobs", -1, "whole number of at least 0"), ("logits_processor", "f", "(token_ids, logits) -> logits"),
        ("logits_processor", [len, 3], "(token_ids, logits) -> logits"),
    ],
)  # fmt: skip
def test_values_out_of_range_name_the_range(engine: offmoe.Engine, option: str, value: Any, words: str) -> None:
    for call in (lambda: SamplingParams(**{option: value}), lambda: engine.generate(PROMPT, **{option: value})):
        with pytest.raises(UsageError) as caught:
            call()
        assert f"{option} is {value!r}; use " in one_line(caught) and words in one_line(caught)


def test_token_ids_that_end_a_reply(engine: offmoe.Engine) -> None:
    whole = greedy(engine)
    stop = whole.token_ids[5]
    at = whole.token_ids.index(stop)
    reply = greedy(engine, stop_token_ids=[stop, 127])
    assert (reply.token_ids, reply.finish_reason, reply.stop_reason) == (whole.token_ids[:at], "stop", stop)
    assert (whole.finish_reason, whole.stop_reason, whole.prompt_tokens) == ("length", None, len(PROMPT))
    with pytest.raises(UsageError, match="token id 128 is not in the vocabulary of 128"):
        greedy(engine, stop_token_ids=[128])


def test_the_models_end_token_may_be_ignored(engine: offmoe.Engine, tmp_path: Path) -> None:
    whole = greedy(engine).token_ids
    folder = save_tiny(tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": whole[4]}))
    with open_tiny(folder) as other:
        reply = greedy(other, ignore_eos=False)
        assert (reply.finish_reason, reply.stop_reason) == ("stop", None)
        assert reply.token_ids == whole[: whole.index(whole[4])]
        assert greedy(other, ignore_eos=True).token_ids == whole


class Even(LogitsProcessor):
    """Rules out odd ids: for transformers, and as a function of one row for offmoe."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.ndim == 1:
            assert scores.shape == (128,) and scores.dtype == torch.float32
            self.seen.append(tuple(input_ids.tolist()))
        scores[..., 1::2] = float("-inf")
        return scores


@pytest.mark.parametrize("options", [{"do_sample": False}, {"do_sample": True, "temperature": 0.8, "top_k": 9}])
def test_a_function_of_logits_is_that_of_transformers(
    engine: offmoe.Engine, plain: PreTrainedModel, options: dict[str, Any]
) -> None:
    torch.manual_seed(5)
    wanted = plain.generate(
        torch.tensor([PROMPT]), max_new_tokens=NUM_NEW, logits_processor=[Even()], **{"top_k": 0, **options}
    )[0, len(PROMPT) :].tolist()
    even = Even()
    given = {"temperature": 0} | {name: value for name, value in options.items() if name != "do_sample"}
    reply = engine.generate(PROMPT, max_new_tokens=NUM_NEW, seed=5, logits_processor=even, **given)
    assert list(reply.token_ids) == wanted and all(id_ % 2 == 0 for id_ in wanted)
    assert even.seen == [(*PROMPT, *reply.token_ids[:num]) for num in range(NUM_NEW)]


def test_functions_of_logits_come_one_after_the_other_and_change_a_copy(engine: offmoe.Engine) -> None:
    before = greedy(engine).token_ids

    def only_7(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        assert float(logits[7]) == 100.0, "after the first one"
        logits.fill_(float("-inf"))
        logits[7] = 0
        return logits

    def raise_7(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        logits[7] = 100
        return logits

    assert greedy(engine, logits_processor=[raise_7, only_7]).token_ids == (7,) * NUM_NEW
    assert greedy(engine).token_ids == before, "the logits that are kept for the same prompt are not changed"


def test_functions_of_logits_that_fail(engine: offmoe.Engine) -> None:
    def broken(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        raise ValueError("mine")

    with pytest.raises(ValueError, match=r"^mine$"):
        greedy(engine, logits_processor=broken)
    with pytest.raises(UsageError, match=r"logits_processor gave back \(64,\); it must give back logits \(128,\)"):
        greedy(engine, logits_processor=lambda ids, logits: logits[:64])
    with pytest.raises(UsageError, match="logits_processor gave back NoneType"):
        greedy(engine, logits_processor=lambda ids, logits: None)
    with pytest.raises(UsageError, match=r"rule out every token.*mend logits_processor"):
        greedy(engine, logits_processor=lambda ids, logits: logits - float("inf"))
    assert_at_rest(engine)
    assert len(greedy(engine).token_ids) == NUM_NEW


def test_penalties_of_the_reply_follow_their_definition(engine: offmoe.Engine, plain: PreTrainedModel) -> None:
    """presence once, frequency as often as a token occurred, in the reply and not in the prompt."""
    presence, frequency = 0.6, 0.9
    ids, counts = list(PROMPT), torch.zeros(128)
    for _ in range(NUM_NEW):
        with torch.no_grad():
            logits = plain(torch.tensor([ids])).logits[0, -1]
        ids.append(int((logits - presence * (counts > 0) - frequency * counts).argmax()))
        counts[ids[-1]] += 1
    reply = greedy(engine, presence_penalty=presence, frequency_penalty=frequency)
    assert list(reply.token_ids) == ids[len(PROMPT) :] != list(greedy(engine).token_ids)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.3, "seed": 1, "top_k": 30, "repetition_penalty": 1.5}])
def test_logprobs_are_those_of_the_models_own_logits(engine: offmoe.Engine, options: dict[str, Any]) -> None:
    chunks = list(engine.stream(PROMPT, max_new_tokens=NUM_NEW, ignore_eos=True, logprobs=4, **options))
    reply = engine.generate(PROMPT, max_new_tokens=NUM_NEW, ignore_eos=True, logprobs=4, **options)
    assert reply.logprobs is not None and len(reply.logprobs) == len(reply.token_ids) == NUM_NEW
    assert [place for chunk in chunks for place in chunk.logprobs or ()] == list(reply.logprobs)
    with torch.no_grad():
        logits = engine.model(torch.tensor([[*PROMPT, *reply.token_ids]])).logits[0, len(PROMPT) - 1 : -1]
    wanted = torch.log_softmax(logits, dim=-1)
    for row, token_id, place in zip(wanted, reply.token_ids, reply.logprobs, strict=True):
        order = row.argsort(descending=True).tolist()
        assert list(place) == list(dict.fromkeys([token_id, *order[:4]]))
        for id_, found in place.items():
            assert found.logprob == pytest.approx(float(row[id_]), abs=2e-5) and found.rank == order.index(id_) + 1
    (alone,) = greedy(engine, max_new_tokens=1, logprobs=0).logprobs or ()
    assert len(alone) == 1 and greedy(engine).logprobs is None


def test_a_list_of_prompts_gives_a_list_of_replies(engine: offmoe.Engine) -> None:
    prompts = [PROMPT, [3, 4, 5], (9, 8, 7, 6)]
    replies = engine.generate(prompts, max_new_tokens=5, temperature=0)
    assert [reply.token_ids for reply in replies] == [
        engine.generate(prompt, max_new_tokens=5, temperature=0).token_ids for prompt in prompts
    ]
    before = engine.stats()["layer_calls"]
    with pytest.raises(UsageError, match="128 is not in the vocabulary"):
        engine.generate([PROMPT, [128]], max_new_tokens=5)
    assert engine.stats()["layer_calls"] == before, "a wrong one is refused before the first is answered"
    assert len(engine.generate([torch.tensor([3, 4])], max_new_tokens=2)) == 1  # type: ignore[list-item]


def test_leaving_a_with_statement_frees_the_engine(engine: offmoe.Engine) -> None:
    with engine.stream(PROMPT, max_new_tokens=50, ignore_eos=True) as stream:
        first = next(stream)
        assert first.token_ids == greedy_first(engine, stream)
    assert list(stream) == []
    stream.close()
    assert len(greedy(engine).token_ids) == NUM_NEW


def greedy_first(engine: offmoe.Engine, stream: offmoe.Stream) -> tuple[int, ...]:
    with pytest.raises(offmoe.EngineBusyError):
        engine.generate(PROMPT)
    stream.close()
    return engine.generate(PROMPT, max_new_tokens=1).token_ids


def test_closing_from_another_thread_ends_the_stream_at_its_next_token(engine: offmoe.Engine) -> None:
    inside, closed = threading.Event(), threading.Event()

    def wait_for_the_close(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        if len(ids) == len(PROMPT) + 2:
            inside.set()
            assert closed.wait(PATIENCE_S)
        return logits

    stream = engine.stream(PROMPT, max_new_tokens=50, ignore_eos=True, logits_processor=wait_for_the_close)

    def close() -> None:
        assert inside.wait(PATIENCE_S)
        stream.close()
        closed.set()

    thread = threading.Thread(target=close)
    thread.start()
    assert sum(len(chunk.token_ids) for chunk in stream) == 2
    thread.join()
    assert_at_rest(engine)
    assert len(greedy(engine).token_ids) == NUM_NEW


def test_records_are_frozen_and_a_reply_is_shown_in_a_line(engine: offmoe.Engine) -> None:
    reply = greedy(engine, max_new_tokens=3)
    assert repr(reply) == "<Reply '' [3 tokens, length]>"
    shown = repr(dataclasses.replace(reply, text="one\ntwo " * 40))
    assert shown.startswith("<Reply 'one\\ntwo one") and len(shown) < 110 and shown.isprintable()
    for record in (reply, offmoe.Chunk("x")):
        assert not hasattr(record, "__dict__")
        with pytest.raises(dataclasses.FrozenInstanceError):
            record.text = "y"  # type: ignore[misc]
