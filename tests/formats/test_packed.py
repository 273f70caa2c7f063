"""Bfloat16 weights in 12 bits: every value comes back, products and logits have the same bits, slots stay sound."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cpu_cases import needs_library, open_kernels
from engines import PROMPT, open_tiny
from families import FAMILIES, build, save_layout
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import offmoe
from offmoe.cache.slots import SlotTable
from offmoe.checkpoint.locate import demo_model_folder
from offmoe.core.keys import ExpertKey
from offmoe.formats.packed_sizes import place_matrices
from offmoe.formats.packed_slot import num_escapes, view_packed
from offmoe.formats.quantised import QuantMatrix
from offmoe.kernels.cpu.decode import CpuLinear
from offmoe.kernels.cpu.kernels import CpuKernels
from offmoe.kernels.cpu.loader import usable_levels
from offmoe.kernels.cpu.packing import CpuPacker
from offmoe.loader import packed_weights
from offmoe.planner.inspect import inspect_checkpoint
from offmoe.planner.packed_sample import count_escapes

pytestmark = needs_library

WIDTHS = (1, 31, 40, 64, 96, 128, 200, 2048)


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.view(torch.int16 if values.itemsize == 2 else torch.int32)


def pack(kernels: CpuKernels, values_NK: torch.Tensor) -> QuantMatrix | None:
    """The packed matrix, None where it has more escapes than there is room for."""
    (place,), num_bytes = place_matrices([(values_NK.shape[0], values_NK.shape[1])])
    slot = torch.zeros(num_bytes, dtype=torch.uint8)
    packer = CpuPacker(kernels)
    packer.pack(values_NK.data_ptr(), 0, len(values_NK), place, slot.data_ptr())
    return view_packed(place, slot, packer.unpack) if num_escapes(place, slot) <= place.most_escapes else None


def check_comes_back(kernels: CpuKernels, values_NK: torch.Tensor) -> bool:
    """Whether it was packed; then both ways back give the same bits."""
    matrix = pack(kernels, values_NK)
    if matrix is None:
        return False
    plain = QuantMatrix(matrix.format, matrix.shape, matrix.codes, matrix.scales, matrix.zeros)
    for way in (matrix, plain):
        assert torch.equal(bits(way.dequantise(torch.bfloat16)), bits(values_NK))
    first = slice(len(values_NK) // 2, len(values_NK))
    assert torch.equal(bits(matrix.dequantise(torch.bfloat16, first)), bits(values_NK[first]))
    return True


def from_bits(numbers: torch.Tensor) -> torch.Tensor:
    return torch.where(numbers >= 1 << 15, numbers - (1 << 16), numbers).to(torch.int16).view(torch.bfloat16)


@pytest.mark.parametrize("level", usable_levels())
def test_all_values_come_back(level: str) -> None:
    """All 65,536: sixteen exponents a row, with both signs; then rows with an escape of every kind among zeros."""
    kernels = open_kernels(level)
    exponents, rest = torch.arange(256), torch.arange(256)
    words = (rest[None] & 128) << 8 | exponents[:, None] << 7 | rest[None] & 127  # (exponent, sign and mantissa)
    assert len(words.unique()) == 65536
    assert check_comes_back(kernels, from_bits(words.view(16, -1)))
    rare = torch.zeros(512, 512, dtype=torch.long)
    rare[torch.arange(512), torch.arange(512)] = torch.arange(512) // 2 << 7 | torch.arange(512) % 2 << 15 | 77
    assert check_comes_back(kernels, from_bits(rare))


@pytest.mark.parametrize("level", usable_levels())
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_matrix_comes_back(level: str, data: st.DataObject) -> None:
    """Rows of few exponents, of all, of one, and any mixture; a matrix that does not fit says so."""
    rows, columns = data.draw(st.integers(1, 9)), data.draw(st.sampled_from(WIDTHS))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 30)))
    spread = data.draw(st.sampled_from([1, 2, 15, 16, 17, 40, 256]))
    base = data.draw(st.integers(0, 256 - spread))
    exponents = base + torch.randint(0, spread, (rows, columns), generator=generator)
    rest = torch.randint(0, 256, (rows, columns), generator=generator)
    values = from_bits((rest & 128) << 8 | exponents << 7 | rest & 127)
    packed = check_comes_back(open_kernels(level), values)
    assert packed or spread > 16
    assert packed or rows * columns > 64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("level", usable_levels())
def test_products_have_the_same_bits(level: str, dtype: torch.dtype) -> None:
    """For one row of x to sixteen, and tiles; escapes in the first and the last piece, zeros, and small numbers."""
    kernels, generator = open_kernels(level), torch.Generator().manual_seed(3)
    for columns in WIDTHS:
        weight = (torch.randn(37, columns, generator=generator) * 0.02).bfloat16()
        weight[::5, 0], weight[1::5, -1], weight[2::7, columns // 2] = 1e18, -1e-30, 0.0
        matrix = pack(kernels, weight)
        assert matrix is not None
        plain, packed = (CpuLinear(kernels, one, None, dtype=dtype) for one in (weight, matrix))
        for rows in (*range(1, 17), 40):
            x = torch.randn(rows, columns, generator=generator).to(dtype)
            assert torch.equal(bits(plain(x)), bits(packed(x))), f"{columns=} {rows=}"


def logits(engine: offmoe.Engine, prompt: list[int]) -> torch.Tensor:
    """Logits of every greedy step, (N, V)."""
    rows: list[torch.Tensor] = []

    def choose(_: torch.Tensor, last: torch.Tensor) -> int:
        rows.append(last.clone())
        return int(last.argmax())

    engine.generate(prompt, max_new_tokens=8, choose=choose, ignore_eos=True)
    return torch.cat(rows)


def is_packable(name: str) -> bool:
    return name not in {"dbrx", "gpt_oss", "llama4", "qwen3_vl_moe", "jetmoe"}


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_logits_have_the_same_bits(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt and tokens after it, experts evicted on the way, linears packed as well, in every family."""
    monkeypatch.setattr(packed_weights, "LEAST_NUMBERS", 1)
    save_layout(build(name, dtype=torch.bfloat16), tmp_path, "published")
    found = {}
    for mode in ("off", "on"):
        with open_tiny(tmp_path, pack=mode, expert_slots=9, compile="off") as engine:
            prompt = [token % min(96, engine.vocab_size) for token in PROMPT * 3]
            found[mode] = logits(engine, prompt)
            stats = engine.stats()
            assert stats["pack"] == mode or stats["notes"], f"{stats['pack']=}"
            assert stats["misses"] > 0
    assert torch.equal(bits(found["off"]), bits(found["on"]))


def save_wide(folder: Path, *, every: int) -> None:
    """A tiny model of bfloat16 weights, of which every so-many-th expert has exponents all over the place."""
    save_layout(build("qwen3_moe", dtype=torch.bfloat16), folder, "published")
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if ".experts." in name:
                scale = 2.0 ** -(torch.arange(tensor.numel()) % 29).view(tensor.shape)
                scale[torch.arange(len(scale)) % every != 0] = 1.0
                tensors[name] = (tensor.float() * scale).bfloat16()
        save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("expert_slots", [3, 9, 16])
def test_experts_that_do_not_fit_lie_as_they_are_stored(every: int, expert_slots: int, tmp_path: Path) -> None:
    save_wide(tmp_path, every=every)
    found = {}
    for mode in ("off", "on"):
        with open_tiny(tmp_path, pack=mode, expert_slots=expert_slots, compile="off") as engine:
            found[mode] = torch.cat([logits(engine, PROMPT), logits(engine, PROMPT[::-1])])
            stats = engine.stats()
            if mode == "on":
                assert stats["pack"] == "on" and stats["wide_experts"] > 0
    assert torch.equal(bits(found["off"]), bits(found["on"]))


def test_a_wide_slot_is_two_slots() -> None:
    table = SlotTable(4)
    first, second = ExpertKey(0, 0), ExpertKey(0, 1)
    slot = table.reserve(first)
    table.take_next(slot)
    table.mark_ready(slot)
    table.check_integrity()
    assert table.num_free == 2
    assert table.reserve(second) not in (slot, slot + 1)
    table.check_integrity()
    assert table.recover(lambda slot: True) == [first]
    table.check_integrity()
    assert table.num_free == 2
    table.evict(first)
    table.check_integrity()
    assert table.num_free == 4


def test_what_cannot_be_packed_is_said(tmp_path: Path) -> None:
    save_layout(build("qwen3_moe"), tmp_path, "published")
    with open_tiny(tmp_path, pack="on") as engine:
        stats = engine.stats()
        assert stats["pack"] == "off"
        assert stats["notes"] == [
            "pack is on, and experts are not packed: they are F32, which has no such redundancy; bfloat16 has"
        ]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "qwen3_moe"
    with open_tiny(tmp_path) as engine:  # nobody asked
        assert engine.stats()["pack"] == "off" and "notes" not in engine.stats()


def test_inspect_counts_escapes_as_the_packer_does() -> None:
    generator = torch.Generator().manual_seed(5)
    values = (torch.randn(64, 2048, generator=generator) * 0.02).bfloat16()
    values[3, :40] *= 1e20
    (place,), num_bytes = place_matrices([(64, 2048)])
    slot = torch.zeros(num_bytes, dtype=torch.uint8)
    CpuPacker(open_kernels()).pack(values.data_ptr(), 0, 64, place, slot.data_ptr())
    counted = count_escapes(values.view(torch.uint8).numpy().tobytes(), 2048)
    assert 0 < counted <= num_escapes(place, slot) <= counted + 64 * (2048 // 1024)  # a row with few is left as it is


def test_inspect_of_the_bundled_model() -> None:
    packed = inspect_checkpoint(demo_model_folder()).packed
    assert packed is not None and 12 < packed.bits < 13 and packed.escape_share < 0.001
