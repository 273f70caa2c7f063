"""The structs of `src/abi.h`, field by field, and the numbers of its enums.

The loader compares `field_places` with what the library says of itself (`src/layout.cpp`).
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p

import torch

ABI_VERSION = 17
TYPES: dict[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
SCALE_TYPES = {"F32": 0, "BF16": 1, "F16": 2, "U8": 3}
DENSE_KINDS: dict[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
QUANT_KINDS = {
    "int8": 3, "int4": 4, "mxfp4": 5, "fp8": 6,
    "q4_0": 7, "q8_0": 8, "q4_k": 9, "q5_k": 10, "q6_k": 11, "mxfp4_gguf": 12,
    "iq4_nl": 13, "iq4_xs": 14, "packed": 15,
}  # fmt: skip
CURVES = {"none": 0, "silu": 1, "gelu": 2, "gelu_tanh": 3, "relu": 4, "relu_squared": 5}


class CMatrix(ctypes.Structure):
    """N rows of K columns; strides in bytes."""

    _fields_ = (
        ("codes", c_void_p), ("scales", c_void_p), ("zeros", c_void_p),
        ("rows", c_int64), ("columns", c_int64),
        ("row_bytes", c_int64), ("scale_row_bytes", c_int64), ("zero_row_bytes", c_int64),
        ("kind", c_int32), ("scale_type", c_int32), ("group", c_int32), ("group_rows", c_int32),
        ("zero", c_int32), ("code_signed", c_int32), ("zeros_packed", c_int32), ("transposed", c_int32),
    )  # fmt: skip


class CActivation(ctypes.Structure):
    """f(gate) * (up + offset), or f(up)."""

    _fields_ = (
        ("curve", c_int32), ("gated", c_int32), ("interleaved", c_int32),
        ("alpha", c_float), ("gate_limit", c_float), ("up_limit", c_float), ("offset", c_float),
    )  # fmt: skip


class CExpert(ctypes.Structure):
    """Two matrices in parts, and their biases."""

    _fields_ = (
        ("up", POINTER(CMatrix)), ("down", POINTER(CMatrix)), ("up_bias", c_void_p), ("down_bias", c_void_p),
        ("num_up", c_int32), ("num_down", c_int32),
    )  # fmt: skip


class CEncode(ctypes.Structure):
    """Numbers to be given codes and scales."""

    _fields_ = (
        ("values", c_void_p), ("codes", c_void_p), ("scales", c_void_p), ("divisors", c_void_p),
        ("num_groups", c_int64),
        ("num_divisors", c_int32), ("group", c_int32), ("bits_a_code", c_int32), ("offset", c_int32),
        ("value_type", c_int32), ("scale_type", c_int32), ("is_finite", c_int32),
    )  # fmt: skip


class CPack(ctypes.Structure):
    """Bfloat16 rows to be packed."""

    _fields_ = (
        ("values", c_void_p), ("codes", c_void_p), ("heads", c_void_p), ("escapes", c_void_p),
        ("num_escapes", c_void_p),
        ("rows", c_int64), ("columns", c_int64), ("row_bytes", c_int64), ("most_escapes", c_int64),
    )  # fmt: skip


class CUnpack(ctypes.Structure):
    """Rows of a packed matrix to be unpacked."""

    _fields_ = (
        ("matrix", c_void_p), ("to", c_void_p), ("begin", c_int64), ("end", c_int64), ("to_row_bytes", c_int64),
    )  # fmt: skip


class CCall(ctypes.Structure):
    """Rows of several experts of one layer."""

    _fields_ = (
        ("activation", c_void_p), ("experts", c_void_p), ("begin", c_void_p), ("token", c_void_p),
        ("choice", c_void_p), ("x", c_void_p), ("y", c_void_p), ("weights", c_void_p), ("total", c_void_p),
        ("x_row_bytes", c_int64), ("y_row_bytes", c_int64), ("total_row_bytes", c_int64),
        ("num_experts", c_int32), ("num_tokens", c_int32), ("top_k", c_int32), ("type", c_int32),
        ("x_type", c_int32), ("weights_type", c_int32), ("total_type", c_int32), ("width", c_int32),
        ("hidden", c_int32),
    )  # fmt: skip


class CLinear(ctypes.Structure):
    """One matrix and a few rows."""

    _fields_ = (
        ("matrix", c_void_p), ("bias", c_void_p), ("x", c_void_p), ("y", c_void_p),
        ("x_row_bytes", c_int64), ("y_row_bytes", c_int64),
        ("num_x", c_int32), ("type", c_int32), ("x_type", c_int32),
    )  # fmt: skip


class CNorm(ctypes.Structure):
    """Rows to be normed."""

    _fields_ = (
        ("x", c_void_p), ("weight", c_void_p), ("bias", c_void_p), ("y", c_void_p), ("rows", c_int64),
        ("width", c_int64), ("eps", c_float), ("kind", c_int32), ("type", c_int32),
    )  # fmt: skip


class CAttend(ctypes.Structure):
    """One token's attention; strides in bytes."""

    _fields_ = (
        ("query", c_void_p), ("key", c_void_p), ("value", c_void_p), ("query_norm", c_void_p), ("key_norm", c_void_p),
        ("cos", c_void_p), ("sin", c_void_p), ("sinks", c_void_p), ("keys", c_void_p), ("values", c_void_p),
        ("output", c_void_p),
        ("num_heads", c_int64), ("num_groups", c_int64), ("width", c_int64), ("value_width", c_int64),
        ("norm_width", c_int64), ("rotary", c_int64), ("num_angles", c_int64),
        ("key_group_bytes", c_int64), ("key_row_bytes", c_int64), ("value_group_bytes", c_int64),
        ("value_row_bytes", c_int64), ("num_rows", c_int64),
        ("eps", c_float), ("scale", c_float), ("norm_kind", c_int32), ("type", c_int32), ("angle_type", c_int32),
        ("neighbours", c_int32), ("norm_last", c_int32), ("cap", c_float),
    )  # fmt: skip


class CLatent(ctypes.Structure):
    """One token's attention to latents; strides in bytes."""

    _fields_ = (
        ("query", c_void_p), ("compressed", c_void_p), ("norm", c_void_p), ("cos", c_void_p), ("sin", c_void_p),
        ("keys", c_void_p), ("values", c_void_p), ("cache", c_void_p), ("output", c_void_p),
        ("num_heads", c_int64), ("key_width", c_int64), ("rotated", c_int64), ("latent", c_int64),
        ("value_width", c_int64), ("row_bytes", c_int64), ("num_rows", c_int64),
        ("eps", c_float), ("scale", c_float), ("norm_kind", c_int32), ("rotation", c_int32), ("type", c_int32),
    )  # fmt: skip


class CRoute(ctypes.Structure):
    """From logits to experts and their weights."""

    _fields_ = (
        ("correction", c_void_p), ("expert_scale", c_void_p), ("ids", c_void_p), ("weights", c_void_p),
        ("scale", c_float), ("added", c_float), ("hidden_score", c_float), ("jitter", c_float), ("scoring", c_int32),
        ("num_experts", c_int32), ("top_k", c_int32), ("num_groups", c_int32), ("top_groups", c_int32),
        ("best_of_group", c_int32), ("normalised", c_int32), ("sorted", c_int32), ("logits_type", c_int32),
        ("weights_type", c_int32), ("rounded", c_int32),
    )  # fmt: skip


class CLayer(ctypes.Structure):
    """One token through a decoder layer up to its experts."""

    _fields_ = (
        ("attend", CAttend), ("x", c_void_p), ("input_norm", c_void_p), ("output_norm", c_void_p),
        ("projections", c_void_p * 4), ("biases", c_void_p * 4), ("state", c_void_p), ("normed", c_void_p),
        ("router", c_void_p), ("router_bias", c_void_p), ("route", CRoute), ("width", c_int64),
        ("input_eps", c_float), ("output_eps", c_float), ("input_kind", c_int32), ("output_kind", c_int32),
    )  # fmt: skip


class CLookup(ctypes.Structure):
    """The experts that a router chose, and their weighted sum."""

    _fields_ = (("experts", c_void_p), ("ids", c_void_p), ("table", c_void_p), ("chosen", c_void_p))


class CChoice(ctypes.Structure):
    """One choice of experts and weights by a row of logits."""

    _fields_ = (("route", c_void_p), ("logits", c_void_p), ("scores", c_void_p))


class CCopy(ctypes.Structure):
    """Rows that lie apart, put together."""

    _fields_ = (("x", c_void_p), ("to", c_void_p), ("rows", c_int64), ("row_bytes", c_int64), ("x_stride", c_int64))


class CDelta(ctypes.Structure):
    """One token through a gated delta net; strides in numbers."""

    _fields_ = (
        ("query", c_void_p), ("key", c_void_p), ("value", c_void_p), ("gate", c_void_p), ("beta", c_void_p),
        ("decay", c_void_p), ("conv", c_void_p), ("conv_state", c_void_p), ("state", c_void_p), ("rate", c_void_p),
        ("decay_bias", c_void_p), ("norm", c_void_p), ("output", c_void_p),
        ("query_stride", c_int64), ("key_stride", c_int64), ("value_stride", c_int64), ("gate_stride", c_int64),
        ("beta_stride", c_int64), ("decay_stride", c_int64),
        ("num_keys", c_int64), ("num_values", c_int64), ("key_width", c_int64), ("value_width", c_int64),
        ("taps", c_int64), ("eps", c_float), ("type", c_int32),
    )  # fmt: skip


class CShortConv(ctypes.Structure):
    """One token through a short convolution."""

    _fields_ = (
        ("input", c_void_p), ("conv", c_void_p), ("bias", c_void_p), ("state", c_void_p), ("output", c_void_p),
        ("channels", c_int64), ("taps", c_int64), ("type", c_int32),
    )  # fmt: skip


class CMamba(ctypes.Structure):
    """One token through a Mamba-2 mixer."""

    _fields_ = (
        ("input", c_void_p), ("conv", c_void_p), ("conv_bias", c_void_p), ("conv_state", c_void_p),
        ("state", c_void_p), ("rate", c_void_p), ("time_bias", c_void_p), ("skip", c_void_p), ("norm", c_void_p),
        ("output", c_void_p), ("num_heads", c_int64), ("num_groups", c_int64), ("width", c_int64), ("size", c_int64),
        ("taps", c_int64), ("eps", c_float), ("type", c_int32),
    )  # fmt: skip


class CActivate(ctypes.Structure):
    """f(gate) * up of one row."""

    _fields_ = (
        ("activation", c_void_p), ("gate", c_void_p), ("up", c_void_p), ("to", c_void_p), ("count", c_int64),
        ("type", c_int32),
    )  # fmt: skip


class CNumbers(ctypes.Structure):
    """Elementwise arithmetic on one row, or on two."""

    _fields_ = (
        ("x", c_void_p), ("y", c_void_p), ("to", c_void_p), ("count", c_int64), ("y_count", c_int64),
        ("scale", c_float), ("what", c_int32), ("type", c_int32),
    )  # fmt: skip


class COp(ctypes.Structure):
    """One step of a program."""

    _fields_ = (("call", c_void_p), ("num_rows", c_void_p), ("ended_ns", c_int64), ("kind", c_int32))


class CProgram(ctypes.Structure):
    """One token through a decoder."""

    _fields_ = (("ops", c_void_p), ("begin", c_int64), ("end", c_int64))


# All of the above.
MIRRORS: tuple[type[ctypes.Structure], ...] = tuple(
    kind for kind in list(globals().values()) if isinstance(kind, type) and issubclass(kind, ctypes.Structure)
)


def field_places() -> dict[str, tuple[int, int]]:
    """Offset and size in bytes of every struct ("Matrix") and field ("Matrix.codes"), under their names in abi.h."""
    found = {}
    for mirror in MIRRORS:
        struct = mirror.__name__.removeprefix("C")
        found[struct] = (0, ctypes.sizeof(mirror))
        for name, *_ in mirror._fields_:
            field = getattr(mirror, name)
            found[f"{struct}.{name}"] = (field.offset, field.size)
    return found
