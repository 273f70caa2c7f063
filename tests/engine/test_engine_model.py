"""`engine.model` is the transformers model: whatever transformers does with it gives what the whole model gives."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import PROMPT, QUARTER, assert_at_rest, engine_threads, open_tiny, plain_model, save_tiny
from makers import one_line
from transformers import PreTrainedModel

import offmoe
from offmoe.core.errors import BudgetError, EngineBusyError, UsageError

PADDED = torch.tensor([PROMPT, [0, 0, 0, 0, *PROMPT[2:8]]])
MASK = torch.tensor([[1] * 10, [0] * 4 + [1] * 6])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def engine(folder: Path) -> Iterator[offmoe.Engine]:
    with open_tiny(folder) as engine:
        yield engine
        assert_at_rest(engine)
        assert engine.stats()["evictions"] > QUARTER, "a quarter of the experts cannot serve this without eviction"


@pytest.fixture(scope="module")
def plain(folder: Path) -> PreTrainedModel:
    return plain_model(folder)


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 1.1, "top_k": 30, "top_p": 0.95},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"do_sample": False, "num_beams": 3},
    "beam sampling": {"do_sample": True, "num_beams": 2},
    "prompt lookup": {"do_sample": False, "prompt_lookup_num_tokens": 3},
    "no cache": {"do_sample": False, "use_cache": False},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
}


@pytest.mark.parametrize("way", WAYS)
def test_generate_gives_what_the_whole_model_gives(engine: offmoe.Engine, plain: PreTrainedModel, way: str) -> None:
    # A prompt that repeats itself, so that prompt lookup has something to find.
    prompt = torch.tensor([PROMPT + PROMPT[:6]])
    results = []
    for model in (plain, engine.model):
        torch.manual_seed(2)
        results.append(model.generate(prompt, max_new_tokens=20, **WAYS[way]).tolist())
    assert results[0] == results[1]


def test_scores_of_beams(engine: offmoe.Engine, plain: PreTrainedModel) -> None:
    options: dict[str, Any] = {
        "num_beams": 3,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    want, got = (model.generate(PADDED[:1], max_new_tokens=8, **options) for model in (plain, engine.model))
    torch.testing.assert_close(got.sequences_scores, want.sequences_scores)


def test_a_padded_batch(engine: offmoe.Engine, plain: PreTrainedModel) -> None:
    with torch.no_grad():
        want, got = (
            model(input_ids=PADDED, attention_mask=MASK).logits[MASK.bool()] for model in (plain, engine.model)
        )
    assert float((got - want).abs().max() / want.abs().max()) < 1e-5
    ids = [
        model.generate(PADDED, attention_mask=MASK, max_new_tokens=12, do_sample=False)
        for model in (plain, engine.model)
    ]
    assert ids[0].tolist() == ids[1].tolist()
    alone = engine.generate(PROMPT[2:8], max_new_tokens=12).token_ids
    assert ids[1][1, PADDED.shape[1] :].tolist() == list(alone), "padding does not change a prompt's reply"


def test_logits_at_every_position(engine: offmoe.Engine, plain: PreTrainedModel) -> None:
    ids = torch.randint(3, 120, (3, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want, got = (model(input_ids=ids).logits for model in (plain, engine.model))
    assert float((got - want).abs().max() / want.abs().max()) < 1e-5


def test_uncached_is_the_same_model(engine: offmoe.Engine, plain: PreTrainedModel) -> None:
    with torch.no_grad():
        want = plain(input_ids=PADDED[:1]).logits
        cached = engine.model(input_ids=PADDED[:1]).logits
        before = engine.stats()
        with engine.uncached():
            uncached = engine.model(input_ids=PADDED[:1]).logits
        assert engine.stats() == {**before, "peak_rss_growth_bytes": engine.stats()["peak_rss_growth_bytes"]}
        engine.model(input_ids=PADDED[:1])
    assert engine.stats()["layer_calls"] == before["layer_calls"] + 2, "afterwards the cache serves again"
    for got in (cached, uncached):
        assert float((got - want).abs().max() / want.abs().max()) < 1e-5


def test_gradients_are_refused(engine: offmoe.Engine) -> None:
    """Nothing would flow back through the experts: neither to an input, nor to a weight that is made to want it."""
    states = engine.model.get_input_embeddings()(PADDED[:1]).requires_grad_()
    with pytest.raises(UsageError, match="a gradient through the experts is wanted"):
        engine.model(inputs_embeds=states)
    assert not engine.model(input_ids=PADDED[:1]).logits.requires_grad
    weight = next(engine.model.parameters()).requires_grad_()
    with pytest.raises(UsageError, match=r"torch.no_grad\(\)"):
        engine.model(input_ids=PADDED[:1])
    weight.requires_grad_(False)
    engine.generate(PROMPT, max_new_tokens=12)


def test_two_threads_take_no_part_of_each_other(engine: offmoe.Engine, plain: PreTrainedModel) -> None:
    with torch.no_grad():
        want = plain(input_ids=PADDED[:1]).logits
    results: list[torch.Tensor] = []
    busy: list[str] = []

    def call() -> None:
        for _ in range(20):
            try:
                with torch.no_grad():
                    results.append(engine.model(input_ids=PADDED[:1]).logits)
            except EngineBusyError as error:
                busy.append(str(error))

    before = engine_threads()
    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) + len(busy) == 60 and results
    assert all(float((got - want).abs().max() / want.abs().max()) < 1e-5 for got in results)
    assert engine_threads() == before
    inside: list[BaseException] = []

    def from_another_thread(*_: object) -> None:
        def call() -> None:
            try:
                engine.model(input_ids=PADDED[:1])
            except EngineBusyError as error:
                inside.append(error)

        thread = threading.Thread(target=call)
        thread.start()
        thread.join()

    hook = engine.model.get_input_embeddings().register_forward_hook(from_another_thread)
    engine.generate(PROMPT, max_new_tokens=2)
    hook.remove()
    assert inside and "another thread" in str(inside[0])
    engine.generate(PROMPT, max_new_tokens=12)


def test_it_is_not_saved_without_its_experts(engine: offmoe.Engine, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no experts in memory.*offmoe quantize"):
        engine.model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    engine.generate(PROMPT, max_new_tokens=12)


def test_a_stream_and_the_model_take_turns(engine: offmoe.Engine) -> None:
    expected = engine.generate(PROMPT, max_new_tokens=6).token_ids
    stream = engine.stream(PROMPT, max_new_tokens=6)
    ids = []
    for piece in stream:
        ids += piece.token_ids
        engine.model.generate(PADDED[1:, 4:], max_new_tokens=2, do_sample=False)
    assert tuple(ids) == expected


def test_the_model_has_no_expert_weights(engine: offmoe.Engine) -> None:
    names = [name for name, _ in engine.model.named_parameters()]
    assert not [name for name in names if "expert" in name], "experts are on disk and in slots, nowhere else"
    assert not any(parameter.is_meta for parameter in engine.model.parameters())
    assert not engine.model.training
    engine.generate(PROMPT, max_new_tokens=3)


def test_calls_beyond_the_budget_are_refused_before_memory_is_taken() -> None:
    """An evaluation harness asks for all logits of many windows: 434 MiB of a budget of 360 were taken."""
    with offmoe.load(ram="700MiB", expert_slots=48, context_length=2048, tell=None) as engine:
        model, vocab = engine.model, engine.vocab_size
        fits = torch.randint(0, vocab, (1, 512))
        with torch.inference_mode():
            assert model(input_ids=fits).logits.shape == (1, 512, vocab)
            before = engine.stats()["peak_rss_growth_bytes"]
            for call in ({}, {"labels": torch.zeros(64, 2048, dtype=torch.long)}, {"use_cache": False}):
                with pytest.raises(BudgetError) as caught:
                    model(input_ids=torch.zeros(64, 2048, dtype=torch.long), **call)
                message = one_line(caught)
                assert "64 x 2048 tokens with 131072 rows of logits" in message and "or load with ram=" in message
        stats = engine.stats()
        assert stats["peak_rss_growth_bytes"] - before < 4 << 20, "refused before, not after"
        assert stats["peak_rss_growth_bytes"] <= 700 << 20
        assert len(engine.generate("def ", max_new_tokens=4, ignore_eos=True).token_ids) == 4, "the engine goes on"
