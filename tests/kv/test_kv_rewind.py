"""A chunk that was broken off leaves no trace in the KV cache, in models of every kind of layer."""

from __future__ import annotations

import pytest
import torch
from families import build
from transformers import PreTrainedModel

from offmoe.engine.step import Forward
from offmoe.hf.internals import experts_modules
from offmoe.kv.cache import make_kv_cache

# Full attention, sliding windows, running states, short convolutions, indexers, compressed and mixed layers.
FAMILIES = [
    "qwen3_moe", "gpt_oss", "granitemoehybrid", "lfm2_moe", "deepseek_v32", "deepseek_v4", "zaya", "minimax_m3_vl",
    "unlimited_ocr",
]  # fmt: skip
CAPACITY = 96


def pieces() -> list[torch.Tensor]:
    """Before, at and after the end of a small window."""
    ids = torch.arange(3, 3 + 60).remainder(128)[None]
    return [ids[:, 0:20], ids[:, 20:45], ids[:, 45:46], ids[:, 46:60]]


def fail_once(model: PreTrainedModel, *, layer: int) -> None:
    """The next call of the experts of `layer` finds no memory."""
    module = experts_modules(model)[layer][1]

    def refuse(*_: object) -> None:
        hook.remove()
        raise torch.OutOfMemoryError("none left")

    hook = module.register_forward_pre_hook(refuse)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("failing", [0, 1, 2, 3])
def test_a_piece_is_redone_as_if_it_had_not_been_tried(name: str, failing: int) -> None:
    model = build(name)
    undisturbed = Forward(model, make_kv_cache(model, CAPACITY))
    expected = [undisturbed(piece) for piece in pieces()]
    forward = Forward(model, make_kv_cache(model, CAPACITY))
    for number, piece in enumerate(pieces()):
        if number == failing:
            position = forward.position
            fail_once(model, layer=len(experts_modules(model)) - 1)
            assert forward.unless_out_of_memory(piece) is None
            assert forward.position == position
        logits = forward.unless_out_of_memory(piece)
        assert logits is not None
        torch.testing.assert_close(logits, expected[number], rtol=0, atol=0)


def test_other_errors_are_raised() -> None:
    model = build("qwen3_moe")
    forward = Forward(model, make_kv_cache(model, CAPACITY))

    def fail(*_: object) -> None:
        raise ValueError("not the device's")

    experts_modules(model)[0][1].register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="not the device's"):
        forward.unless_out_of_memory(pieces()[0])
