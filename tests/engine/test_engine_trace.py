"""An engine's trace: what the routers chose, what was guessed, and nothing changed by looking."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from engines import PROMPT, open_tiny, save_tiny

from offmoe.checkpoint.identity import model_hash
from offmoe.core.errors import EngineBusyError
from offmoe.trace.reader import read_trace


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("prefetch", ["off", "1"])
def test_a_trace_holds_every_call_and_changes_nothing(tiny: Path, tmp_path: Path, prefetch: str) -> None:
    with open_tiny(tiny, prefetch=prefetch, prefill_chunk=4) as engine:
        plain = engine.generate(PROMPT, max_new_tokens=6, temperature=0)
    with open_tiny(tiny, prefetch=prefetch, prefill_chunk=4) as engine:
        with engine.trace(tmp_path / "a", prompts={"why": "test"}):
            reply = engine.generate(PROMPT, max_new_tokens=6, temperature=0)
            with pytest.raises(EngineBusyError), engine.trace(tmp_path / "b"):
                pass
        recent = engine.recent_routing()
        engine.generate(PROMPT, max_new_tokens=2)
    assert reply.token_ids == plain.token_ids
    trace = read_trace(tmp_path / "a", model_hash=model_hash(tiny))
    assert trace.is_complete and trace.header.prompts == {"why": "test"} and trace.prompt_starts == [0]
    # Two layers; the prompt in chunks of 4, 4 and 2, then one token at a time; the last id is not read.
    assert [event.layer_idx for event in trace.events] == [0, 1] * (3 + 5)
    assert [event.num_tokens for event in trace.events[::2]] == [4, 4, 2] + [1] * 5
    assert [event.is_prefill for event in trace.events[::2]] == [True] * 3 + [False] * 5
    assert trace.num_decoded == 5
    assert [(event.layer_idx, list(event.ids)) for event in recent] == [
        (event.layer_idx, list(event.ids)) for event in trace.events
    ]
    for event in trace.events:
        assert event.weights is not None and len(event.weights) == len(event.ids) == 2 * event.num_tokens
        guessed = event.layer_idx == 1 and not event.is_prefill
        assert set(event.guesses) == ({1} if guessed else set())
    lookups = sum(len(event.rows_by_expert()) for event in trace.events)
    assert lookups == reply.stats.prefill.lookups + reply.stats.decode.lookups


def test_a_prompt_of_one_token_is_a_prompt(tiny: Path, tmp_path: Path) -> None:
    with open_tiny(tiny, expert_slots=16) as engine, engine.trace(tmp_path / "a", guesses=False):
        engine.generate([5], max_new_tokens=3)
        engine.generate([6], max_new_tokens=1)
    trace = read_trace(tmp_path / "a")
    assert [event.is_prefill for event in trace.events] == [True, True] + [False] * 4 + [True, True]
    assert trace.prompt_starts == [0, 6]
    assert not any(event.guesses for event in trace.events)


def test_a_copy_is_the_same_model_and_another_is_not(tiny: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny, tmp_path / "copy"))
    assert model_hash(copy) == model_hash(tiny)
    config = copy / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "rope_theta": 12345.0}))
    assert model_hash(copy) != model_hash(tiny)
    shards = save_tiny(tmp_path / "shards", layout="shards")
    assert model_hash(shards) == model_hash(tiny)
