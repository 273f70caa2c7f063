"""The values of GGUF's IQ and TQ blocks: bit for bit those of the gguf package; and a model that is stored in them."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf_makers import make_model, save_gguf

import offmoe
from offmoe.checkpoint.quant_format import BLOCK_KINDS, QuantKind
from offmoe.formats.blocks import block_values

# Where the float16 scales of a block lie; iq1_m's is spread over others' upper bits.
SCALES: dict[QuantKind, tuple[int, ...]] = {
    "iq4_nl": (0,), "iq4_xs": (0,), "iq3_xxs": (0,), "iq3_s": (0,), "iq2_xxs": (0,), "iq2_xs": (0,), "iq2_s": (0,),
    "iq1_s": (0,), "iq1_m": (), "tq1_0": (52,), "tq2_0": (64,),
}  # fmt: skip


def random_blocks(kind: QuantKind, rows: int, blocks: int) -> np.ndarray:
    rng = np.random.default_rng(7)
    made = rng.integers(0, 256, (rows, blocks, BLOCK_KINDS[kind].num_bytes), dtype=np.uint8)
    for at in SCALES[kind]:
        made[..., at : at + 2] = rng.uniform(-2e-2, 2e-2, (rows, blocks, 1)).astype(np.float16).view(np.uint8)
    if kind == "iq1_m":  # the upper half-byte of the scale's float16, in the last of its four words
        made[..., 55] &= 0x3F
    return made.reshape(rows, -1)


@pytest.mark.parametrize("kind", SCALES)
def test_values_are_those_of_the_gguf_package(kind: QuantKind) -> None:
    codes = random_blocks(kind, 5, 6)
    expected = gguf.dequantize(codes, Type(BLOCK_KINDS[kind].type_number))
    got = block_values(kind, torch.from_numpy(codes))
    assert got.dtype == torch.float32
    assert got.shape == expected.shape
    assert np.array_equal(got.numpy().view(np.int32), expected.astype(np.float32).view(np.int32))


@pytest.mark.parametrize("kind", [Type.TQ1_0, Type.TQ2_0])
def test_a_model_in_such_blocks_has_their_values(kind: Type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offmoe.loader.build._gguf_dtype", lambda index: torch.float32)
    expected, path = make_model("qwen3moe"), tmp_path / "model.gguf"
    save_gguf(path, "qwen3moe", expected, dict.fromkeys(("gate", "up", "down", "dense"), kind))
    ids = torch.randint(3, 100, (1, 12), generator=torch.Generator().manual_seed(1))
    with offmoe.load(path, ram="4GiB", expert_slots=4) as engine, torch.no_grad():
        got = engine.model(input_ids=ids).logits
        wanted = expected(input_ids=ids).logits
    assert torch.allclose(got, wanted, atol=2e-4, rtol=0), float((got - wanted).abs().max())
