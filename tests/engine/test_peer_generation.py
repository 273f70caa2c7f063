"""Ideas of transformers' own generation tests (tests/generation/test_utils.py), on `engine.model` against plain models.

Two attention kinds each: one full (qwen3_moe), one with windows and sinks (gpt_oss).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import PROMPT, assert_at_rest, open_tiny, plain_model, save_tiny
from transformers import DynamicCache, PreTrainedModel

import offmoe

FAMILIES = ("qwen3_moe", "gpt_oss")
IDS = torch.tensor([PROMPT + PROMPT[:6]])
PADDED = torch.tensor([PROMPT, [0, 0, 0, 0, *PROMPT[2:8]], [0, 0, 0, 0, 0, 0, 0, *PROMPT[:3]]])
MASK = (PADDED != 0).long()
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 10}


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"), request.param)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[offmoe.Engine]:
    with open_tiny(folder) as engine:
        yield engine
        assert_at_rest(engine)


@pytest.fixture(scope="module")
def models(folder: Path, engine: offmoe.Engine) -> tuple[PreTrainedModel, PreTrainedModel]:
    return plain_model(folder), engine.model


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.shape == want.shape
    finite = torch.isfinite(want)
    assert torch.equal(torch.isfinite(got), finite)
    assert float((got - want)[finite].abs().max() / want[finite].abs().max()) < 1e-5


def both(models: tuple[PreTrainedModel, PreTrainedModel], call: Callable[[PreTrainedModel], Any]) -> tuple[Any, Any]:
    """What `call` gives with the plain model and with the engine's."""
    found = []
    for model in models:
        torch.manual_seed(5)
        with torch.inference_mode():
            found.append(call(model))
    return found[0], found[1]


WAYS: dict[str, dict[str, Any]] = {
    "batch, left padded": {"do_sample": False},
    "batch, sampling": {"do_sample": True, "top_k": 40, "min_p": 0.02, "temperature": 0.9},
    "batch, beams, all of them": {"do_sample": False, "num_beams": 4, "num_return_sequences": 4, "length_penalty": 0.7},
    "batch, several samples": {"do_sample": True, "num_return_sequences": 3},
    "batch, static cache": {"do_sample": False, "cache_implementation": "static"},
    "batch, processors": {
        "do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 4,
        "suppress_tokens": [7, 9], "bad_words_ids": [[11, 12]], "forced_eos_token_id": 2,
    },
    "batch, typical": {"do_sample": True, "typical_p": 0.6, "eta_cutoff": 1e-3},
    "batch, ends at different steps": {"do_sample": False, "eos_token_id": list(range(40, 90)), "pad_token_id": 0},
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_batches(models: tuple[PreTrainedModel, PreTrainedModel], way: str) -> None:
    want, got = both(models, lambda model: model.generate(PADDED, attention_mask=MASK, max_new_tokens=10, **WAYS[way]))
    assert got.tolist() == want.tolist()


def test_padding_changes_no_reply(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    together = models[1].generate(PADDED, attention_mask=MASK, **GREEDY)
    for row, mask, reply in zip(PADDED, MASK, together, strict=True):
        alone = models[1].generate(row[mask.bool()][None], **GREEDY)
        assert reply[len(row) :].tolist() == alone[0, int(mask.sum()) :].tolist()


def test_what_generate_gives_beside_ids(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    options = {"output_scores": True, "output_logits": True, "output_hidden_states": True}
    want, got = both(models, lambda model: model.generate(IDS, return_dict_in_generate=True, **options, **GREEDY))
    assert got.sequences.tolist() == want.sequences.tolist()
    assert len(got.scores) == len(want.scores) == 10
    for mine, other in zip((*got.scores, *got.logits), (*want.scores, *want.logits), strict=True):
        close(mine, other)
    for step, other_step in zip(got.hidden_states, want.hidden_states, strict=True):
        for mine, other in zip(step, other_step, strict=True):
            close(mine, other)
    mine, other = (
        model.compute_transition_scores(found.sequences, found.scores, normalize_logits=True)
        for model, found in zip(models, (want, got), strict=True)
    )
    close(mine, other)


@pytest.mark.parametrize("what", ["the engine's model is helped", "the engine's model helps"])
def test_assisted_decoding(models: tuple[PreTrainedModel, PreTrainedModel], what: str) -> None:
    plain, ours = models
    model, assistant = (ours, plain) if what.endswith("is helped") else (plain, ours)
    got = model.generate(IDS, assistant_model=assistant, **GREEDY)
    assert got.tolist() == plain.generate(IDS, **GREEDY).tolist()


def test_embeddings_in_the_place_of_ids(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    want, got = both(models, lambda model: model.generate(inputs_embeds=model.get_input_embeddings()(IDS), **GREEDY))
    assert got.tolist() == want.tolist() == models[0].generate(IDS, **GREEDY)[:, IDS.shape[1] :].tolist()


def test_going_on_from_a_cache(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    """A second turn with the first one's keys and values is the reply to the whole text."""

    def two_turns(model: PreTrainedModel) -> Any:
        first = model.generate(IDS, return_dict_in_generate=True, **GREEDY)
        ids = torch.cat([first.sequences, IDS[:, :4]], dim=1)
        again = model.generate(ids, past_key_values=first.past_key_values, **GREEDY)
        return again.tolist(), model.generate(ids, **GREEDY).tolist()

    want, got = both(models, two_turns)
    assert got == want and got[0] == got[1]


def test_forwards_with_all_that_may_be_asked_for(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    """Pieces with a cache, a mask, positions, labels and hidden states."""

    def pieces(model: PreTrainedModel) -> tuple[Any, Any, Any]:
        cache = DynamicCache(config=model.config)
        first = model(input_ids=PADDED[:, :6], attention_mask=MASK[:, :6], past_key_values=cache)
        positions = (MASK.cumsum(1) - 1).clamp(min=0)[:, 6:]
        rest = model(
            input_ids=PADDED[:, 6:], attention_mask=MASK, position_ids=positions, past_key_values=cache,
            output_hidden_states=True, logits_to_keep=2,
        )  # fmt: skip
        labels = model(input_ids=IDS, labels=IDS, use_cache=False)
        return first, rest, labels

    want, got = both(models, pieces)
    close(got[0].logits[MASK[:, :6].bool()], want[0].logits[MASK[:, :6].bool()])
    close(got[1].logits, want[1].logits)
    assert got[1].logits.shape[1] == 2
    for mine, other in zip(got[1].hidden_states, want[1].hidden_states, strict=True):
        close(mine, other)
    close(got[2].loss, want[2].loss)


def test_a_streamer_and_a_stop_of_ones_own(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    class Streamer:
        def __init__(self) -> None:
            self.ids: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.ids += value.reshape(-1).tolist()

        def end(self) -> None:
            self.ids.append(-1)

    def run(model: PreTrainedModel) -> tuple[list[int], Any]:
        streamer = Streamer()

        def enough(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return torch.tensor([ids.shape[1] >= IDS.shape[1] + 5])

        found = model.generate(IDS, streamer=streamer, stopping_criteria=[enough], **GREEDY)
        return streamer.ids, found.tolist()

    want, got = both(models, run)
    assert got == want
    assert got[0] == [*got[1][0], -1] and len(got[1][0]) == IDS.shape[1] + 5
