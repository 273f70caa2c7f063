"""Log probabilities of a prompt's tokens: those of transformers' own logits, without a matrix of all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engines import PROMPT, open_tiny, plain_model, save_tiny

import offmoe
from offmoe.core.errors import UsageError
from offmoe.engine.prompt_logprobs import PromptScorer

LONG = [(i * 37 + 5) % 128 for i in range(90)]
# Plain, a soft cap, divided logits, multiplied logits, windows, running states.
FAMILIES = ["qwen3_moe", "gemma4", "granitemoe", "mixtral", "gpt_oss", "qwen3_next", "cohere2_moe"]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("chunk", [256, 32])
def test_they_are_those_of_transformers(name: str, chunk: int, tmp_path: Path) -> None:
    save_tiny(tmp_path, name)
    with torch.inference_mode():
        expected = plain_model(tmp_path)(input_ids=torch.tensor([LONG])).logits[0].float().log_softmax(-1)
    with open_tiny(tmp_path, prefill_chunk=chunk) as engine:
        reply = engine.generate(LONG, max_new_tokens=1, prompt_logprobs=2, temperature=0)
    found = reply.prompt_logprobs
    assert found is not None and len(found) == len(LONG) and found[0] is None
    for place, (entry, token_id) in enumerate(zip(found[1:], LONG[1:], strict=True)):
        assert entry is not None
        row = expected[place]
        assert entry[token_id].logprob == pytest.approx(float(row[token_id]), abs=2e-3)
        assert int(row.argmax()) in entry or float(row.max() - row[token_id]) < 1e-3
        assert 2 <= len(entry) <= 3


def test_nothing_is_written_for_zero_tokens(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    with open_tiny(tmp_path) as engine:
        reply = engine.generate(PROMPT, max_new_tokens=0, prompt_logprobs=0)
        assert (reply.token_ids, reply.text, reply.finish_reason) == ((), "", "length")
        assert reply.prompt_logprobs is not None and len(reply.prompt_logprobs) == len(PROMPT)
        assert reply.stats.new_tokens == 0 and reply.stats.prefill_s > 0
        with pytest.raises(UsageError, match="max_new_tokens is 0"):
            engine.generate(PROMPT, max_new_tokens=0)


def test_rows_are_few_where_memory_is_small(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    with open_tiny(tmp_path) as engine:
        assert PromptScorer(engine.model, 1, workspace_bytes=0).rows == 1
        assert PromptScorer(engine.model, 1, workspace_bytes=1 << 40).rows == 64


def test_a_model_that_changes_its_logits_in_another_way_writes_them_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path)
    with open_tiny(tmp_path) as engine:
        expected = engine.generate(LONG, max_new_tokens=1, prompt_logprobs=1, temperature=0)
        # The head's numbers are not the logits any more: they are turned around behind it.
        whole = type(engine.model).forward

        def other(self: torch.nn.Module, *args: object, **kwargs: object) -> object:
            output = whole(self, *args, **kwargs)
            output.logits = output.logits * 1.5
            return output

        monkeypatch.setattr(type(engine.model), "forward", other)
        got = engine.generate(LONG, max_new_tokens=1, prompt_logprobs=1, temperature=0)
        assert got.prompt_logprobs is not None and expected.prompt_logprobs is not None
        assert len(got.prompt_logprobs) == len(LONG)
        assert got.prompt_logprobs[5] != expected.prompt_logprobs[5]
        assert got.token_ids == expected.token_ids


def test_what_is_kept_does_not_hide_a_part_of_the_prompt(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    with open_tiny(tmp_path) as engine:
        engine.generate(LONG, max_new_tokens=2)
        again = engine.generate(LONG, max_new_tokens=2, prompt_logprobs=0, reuse=True)
        assert again.stats.reused_tokens == 0 and again.prompt_logprobs is not None
        assert len(again.prompt_logprobs) == len(LONG)


def test_without_it_there_is_none(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    with open_tiny(tmp_path) as engine:
        reply: offmoe.Reply = engine.generate(PROMPT, max_new_tokens=2)
        assert reply.prompt_logprobs is None
