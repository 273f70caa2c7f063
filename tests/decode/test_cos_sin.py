"""Tables of rotary angles against the module that makes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRotaryEmbedding

from offmoe.decode.fused import CosSinTable

PLACES = (0, 1, 255, 256, 700, 257, 1)
KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 256},
    "dynamic": {"factor": 2.0},
}


class Counted(nn.Module):
    """A rotary module that notes how many positions it was asked for."""

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary, self.rope_type = rotary, rotary.rope_type
        self.asked: list[int] = []

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        self.asked.append(position_ids.shape[-1])
        return self.rotary(x, position_ids)


def rotary_of(kind: str) -> Counted:
    config = AutoConfig.for_model(
        "qwen3_moe", hidden_size=64, num_attention_heads=4, head_dim=16, max_position_embeddings=512,
        rope_parameters={"rope_type": kind, "rope_theta": 1e4, **KINDS[kind]},
    )  # fmt: skip
    return Counted(Qwen3MoeRotaryEmbedding(config))


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_bits_are_the_modules_own(kind: str, dtype: torch.dtype, by_name: bool) -> None:
    rotary, plain = rotary_of(kind), rotary_of(kind)
    table, x = CosSinTable(rotary, by_name=by_name), torch.zeros(1, 1, 64, dtype=dtype)
    for place in PLACES:
        at = torch.tensor([[place]])
        for ours, theirs in zip(table(x, at), plain(x, at), strict=True):
            assert ours.dtype == dtype and torch.equal(ours, theirs)
    if kind == "dynamic":  # frequencies follow the longest position: always asked
        assert rotary.asked == [1] * len(PLACES)
    else:  # once a block of 256, and once for the position itself
        assert sorted(rotary.asked) == [1] * 5 + [256] * 5


def test_a_table_that_differs_is_not_used() -> None:
    class Skewed(Counted):
        def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
            cos, sin = super().forward(x, position_ids)
            return cos + (position_ids.shape[-1] > 1), sin

    rotary = Skewed(rotary_of("default").rotary)
    table, x = CosSinTable(rotary, by_name=True), torch.zeros(1, 1, 64)
    for place in (3, 4):
        at = torch.tensor([[place]])
        assert torch.equal(table(x, at)[0], rotary.rotary(x, at)[0])
    assert rotary.asked == [1, 256, 1]


def test_hooks_see_every_token() -> None:
    rotary, seen = rotary_of("default"), []
    rotary.register_forward_hook(lambda *_: seen.append(1))
    table, x = CosSinTable(rotary, by_name=False), torch.zeros(1, 1, 64)
    for place in range(3):
        table(x, torch.tensor([[place]]))
    assert len(seen) == 3
