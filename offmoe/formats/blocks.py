"""The values of GGUF's blocks, in plain torch, bit for bit those of the gguf package's own `gguf.quants`.

B blocks of one kind as bytes, (B, bytes of a block) -> (B, columns of a block) in float32. Two formulas serve all but
one kind: scale * (code - offset), and scale * code - minimum. Codes of 5 and 6 bits keep their upper bits apart.
Source: `dequantize_row_*` in https://github.com/ggml-org/ggml/blob/master/src/ggml-quants.c
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from offmoe.checkpoint.quant_format import BLOCK_KINDS, QuantKind

# Twice the values of e2m1: the scale of a block is halved for them.
_DOUBLED_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def block_values(kind: QuantKind, codes_RC: torch.Tensor) -> torch.Tensor:
    """Rows of blocks as bytes, (R, C) -> their values, (R, K) float32. The rows may be strided, a row is not."""
    block = BLOCK_KINDS[kind]
    blocks = codes_RC.reshape(-1, block.num_bytes)
    return _VALUES[kind](blocks).reshape(codes_RC.shape[0], -1)


def _half(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """The float16 at byte `at` of every block, (B, 1)."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _fields(data: torch.Tensor, shifts: tuple[int, ...], mask: int, run: int) -> torch.Tensor:
    """Bit fields: of each `run` bytes those at the first shift, then those at the next; (B, n) -> (B, n * shifts)."""
    places = torch.tensor(shifts, dtype=torch.uint8, device=data.device).view(1, 1, -1, 1)
    return ((data.reshape(len(data), -1, 1, run) >> places) & mask).reshape(len(data), -1)


def _nibbles(data: torch.Tensor, run: int) -> torch.Tensor:
    return _fields(data, (0, 4), 15, run)


def _bits(data: torch.Tensor) -> torch.Tensor:
    """Bit i of byte j is number 8 j + i."""
    places = torch.arange(8, dtype=torch.uint8, device=data.device)
    return ((data[:, :, None] >> places) & 1).reshape(len(data), -1)


def _q4_0(blocks: torch.Tensor) -> torch.Tensor:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:], 16).float() - 8)


def _q4_1(blocks: torch.Tensor) -> torch.Tensor:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:], 16).float() + _half(blocks, 2)


def _q5_0(blocks: torch.Tensor) -> torch.Tensor:
    codes = _nibbles(blocks[:, 6:], 16) | (_bits(blocks[:, 2:6]) << 4)
    return _half(blocks, 0) * (codes.float() - 16)


def _q5_1(blocks: torch.Tensor) -> torch.Tensor:
    codes = _nibbles(blocks[:, 8:], 16) | (_bits(blocks[:, 4:8]) << 4)
    return _half(blocks, 0) * codes.float() + _half(blocks, 2)


def _q8_0(blocks: torch.Tensor) -> torch.Tensor:
    return _half(blocks, 0) * blocks[:, 2:].contiguous().view(torch.int8).float()


def _mxfp4(blocks: torch.Tensor) -> torch.Tensor:
    exponents = blocks[:, :1].to(torch.int32)
    small = torch.tensor(1 << 21, dtype=torch.int32, device=blocks.device) << exponents.clamp(max=1)
    scales = torch.where(exponents < 2, small, (exponents - 1) << 23).view(torch.float32)
    values = torch.tensor(_DOUBLED_E2M1, dtype=torch.float32, device=blocks.device)
    return scales * values[_nibbles(blocks[:, 1:], 16).long()]


def _grouped(scales_BG: torch.Tensor, codes_BK: torch.Tensor) -> torch.Tensor:
    """Each scale times the codes of its group of columns."""
    return scales_BG[:, :, None] * codes_BK.view(*scales_BG.shape, -1)


def _less(values_BGn: torch.Tensor, minima_BG: torch.Tensor) -> torch.Tensor:
    return (values_BGn - minima_BG[:, :, None]).flatten(1)


def _six_bits(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The 8 scales and 8 minima of q4_k and q5_k, of six bits each, in 12 bytes."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat([first & 63, (third & 15) | ((first >> 6) << 4)], 1)
    minima = torch.cat([second & 63, (third >> 4) | ((second >> 6) << 4)], 1)
    return scales.float(), minima.float()


def _q2_k(blocks: torch.Tensor) -> torch.Tensor:
    packed, scale, minimum = blocks[:, :16], _half(blocks, 80), _half(blocks, 82)
    codes = _fields(blocks[:, 16:80], (0, 2, 4, 6), 3, 32).float()
    return _less(_grouped(scale * (packed & 15).float(), codes), minimum * (packed >> 4).float())


def _q3_k(blocks: torch.Tensor) -> torch.Tensor:
    packed = blocks[:, 96:108]
    scales = _nibbles(packed[:, :8], 8) | (_fields(packed[:, 8:], (0, 2, 4, 6), 3, 4) << 4)
    low = _fields(blocks[:, 32:96], (0, 2, 4, 6), 3, 32)
    high = _fields(blocks[:, :32], (0, 1, 2, 3, 4, 5, 6, 7), 1, 32)
    codes = (low | (high << 2)).float() - 4
    return _grouped(_half(blocks, 108) * (scales.float() - 32), codes).flatten(1)


def _q4_k(blocks: torch.Tensor) -> torch.Tensor:
    scales, minima = _six_bits(blocks[:, 4:16])
    codes = _nibbles(blocks[:, 16:], 32).float()
    return _less(_grouped(_half(blocks, 0) * scales, codes), _half(blocks, 2) * minima)


def _q5_k(blocks: torch.Tensor) -> torch.Tensor:
    scales, minima = _six_bits(blocks[:, 4:16])
    high = _fields(blocks[:, 16:48], (0, 1, 2, 3, 4, 5, 6, 7), 1, 32)
    codes = (_nibbles(blocks[:, 48:], 32) | (high << 4)).float()
    return _less(_grouped(_half(blocks, 0) * scales, codes), _half(blocks, 2) * minima)


def _q6_k(blocks: torch.Tensor) -> torch.Tensor:
    low, high = _nibbles(blocks[:, :128], 64), _fields(blocks[:, 128:192], (0, 2, 4, 6), 3, 32)
    scales = _half(blocks, 208) * blocks[:, 192:208].contiguous().view(torch.int8).float()
    return _grouped(scales, (low | (high << 4)).float() - 32).flatten(1)


# What a code of iq4_nl and iq4_xs stands for.
_UNEVEN = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _uneven(codes: torch.Tensor) -> torch.Tensor:
    return torch.tensor(_UNEVEN, dtype=torch.float32, device=codes.device)[codes.long()]


def _iq4_nl(blocks: torch.Tensor) -> torch.Tensor:
    return _half(blocks, 0) * _uneven(_nibbles(blocks[:, 2:], 16))


def _iq4_xs(blocks: torch.Tensor) -> torch.Tensor:
    low = _fields(blocks[:, 4:8], (0, 4), 15, 1)
    scales = (low | (_fields(blocks[:, 2:4], (0, 2, 4, 6), 3, 1) << 4)).float() - 32
    return _grouped(_half(blocks, 0) * scales, _uneven(_nibbles(blocks[:, 8:], 16))).flatten(1)


def _by_gguf(kind: QuantKind) -> Callable[[torch.Tensor], torch.Tensor]:
    """Kinds whose codes stand for rows of large tables: the gguf package has the tables, and computes the values."""

    def values(blocks: torch.Tensor) -> torch.Tensor:
        import gguf

        number = gguf.GGMLQuantizationType(BLOCK_KINDS[kind].type_number)
        found = gguf.dequantize(blocks.cpu().contiguous().numpy(), number)
        return torch.from_numpy(found).to(blocks.device)

    return values


_TABLES: tuple[QuantKind, ...] = (
    "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq1_s", "iq1_m", "tq1_0", "tq2_0",
)  # fmt: skip
_VALUES: dict[QuantKind, Callable[[torch.Tensor], torch.Tensor]] = {
    "q4_0": _q4_0, "q4_1": _q4_1, "q5_0": _q5_0, "q5_1": _q5_1, "q8_0": _q8_0, "q2_k": _q2_k, "q3_k": _q3_k,
    "q4_k": _q4_k, "q5_k": _q5_k, "q6_k": _q6_k, "mxfp4_gguf": _mxfp4,
    "iq4_nl": _iq4_nl, "iq4_xs": _iq4_xs, **{kind: _by_gguf(kind) for kind in _TABLES},
}  # fmt: skip
assert _VALUES.keys() == BLOCK_KINDS.keys(), "every kind of block has its values"
