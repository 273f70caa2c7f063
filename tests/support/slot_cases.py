"""Layers made by hand in every layout a checkpoint stores experts in, filled into a slab; for the kernels' tests.

Shapes: D model width, F expert width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from offmoe.checkpoint.expert_index import ExpertPart, MoeLayer, Span
from offmoe.formats.dense import view_expert
from offmoe.formats.layout import layout_of
from offmoe.formats.quantised import QuantMatrix
from offmoe.kernels.reference import ExpertMath

Weight = torch.Tensor | QuantMatrix

LAYOUTS = ("published", "stacked", "transposed", "turned", "interleaved")
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True, kw_only=True)
class SlotCase:
    """A layer with its arithmetic, and a slab whose slot s holds the weights of expert `expert_of_slot[s]`."""

    layer: MoeLayer
    math: ExpertMath
    slab: torch.Tensor
    slot_bytes: int
    slot_of_E: torch.Tensor

    def rows(self, num_tokens: int, top_k: int, *, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(x_TD, expert_ids_TK, weights_TK), ids distinct within a token."""
        generator = torch.Generator().manual_seed(seed)
        down = self.layer.down[0]
        width_D = down.shape[1 if self.layer.transposed and isinstance(down, ExpertPart) else 0]
        x_TD = torch.randn(num_tokens, width_D, generator=generator).to(self.math.dtype)
        scores = torch.rand(num_tokens, self.layer.num_experts, generator=generator)
        weights_TK, ids_TK = scores.topk(top_k)
        device = self.slab.device
        return x_TD.to(device), ids_TK.to(device), weights_TK.to(device)


def make_case(
    *, layout: str, dtype: torch.dtype, width_D: int, width_F: int, activate: Callable[[torch.Tensor], torch.Tensor],
    gated: bool = True, biases: bool = False, num_experts: int = 6, missing: tuple[int, ...] = (), top_k: int = 2,
    device: str = "cpu",
) -> SlotCase:  # fmt: skip
    """Random experts. published: a source a matrix. stacked: gate and up in one source. transposed: the module computes
    x @ W. turned: stored (in, out), used as (out, in). interleaved: stored rows of gate and up take turns."""
    sources, up, down = _parts(layout, gated, width_D, width_F, dtype)
    sizes = [count * dtype.itemsize for count in sources]
    spans = tuple(Span(file_idx=0, start=0, num_bytes=size) for size in sizes)
    layer = MoeLayer(
        name=layout, num_experts=num_experts, top_k=top_k, up=up, down=down, transposed=layout == "transposed",
        spans=(spans,) * num_experts,
    )  # fmt: skip
    width_up = 2 * width_F if gated else width_F

    def fill(part: Weight, generator: torch.Generator) -> None:
        assert isinstance(part, torch.Tensor)
        part.copy_(torch.randn(part.shape, generator=generator) * part.shape[1] ** -0.5)

    return fill_slab(
        layer,
        fill,
        (width_up, width_D) if biases else None,
        activate=activate,
        dtype=dtype,
        missing=missing,
        device=device,
    )


def fill_slab(
    layer: MoeLayer, fill: Callable[[Weight, torch.Generator], None], biases: tuple[int, int] | None, *,
    activate: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype, missing: tuple[int, ...], device: str,
) -> SlotCase:  # fmt: skip
    """The layer's experts but `missing` in slots, last one first, each matrix by `fill`. `biases`: the
    widths of up's and down's."""
    generator = torch.Generator().manual_seed(5)
    present = [expert for expert in range(layer.num_experts) if expert not in missing]
    slot_bytes = layout_of(layer).slot_bytes + 256
    slab = torch.zeros((len(present) + 1) * slot_bytes, dtype=torch.uint8)
    slot_of_E = torch.full((layer.num_experts,), -1, dtype=torch.int32)
    for slot, expert in enumerate(reversed(present)):
        slot_of_E[expert] = slot
        weights = view_expert(layer, slab[slot * slot_bytes : (slot + 1) * slot_bytes], layout_of(layer).offsets)
        for part in (*weights.up, *weights.down):
            fill(part, generator)
    up_bias, down_bias = (
        None if biases is None else torch.randn(layer.num_experts, width, generator=generator).to(device, dtype)
        for width in biases or (0, 0)
    )
    math = ExpertMath(
        activate=activate, up_bias_EF=up_bias, down_bias_ED=down_bias, post_norm=None, transposed=layer.transposed,
        dtype=dtype,
    )  # fmt: skip
    return SlotCase(layer=layer, math=math, slab=slab.to(device), slot_bytes=slot_bytes, slot_of_E=slot_of_E.to(device))


def _parts(
    layout: str, gated: bool, width_D: int, width_F: int, dtype: torch.dtype
) -> tuple[list[int], tuple[ExpertPart, ...], tuple[ExpertPart, ...]]:
    """Elements of every source, and the parts of up and down."""
    name, width_up = _NAMES[dtype], 2 * width_F if gated else width_F

    def part(source_idx: int, shape: tuple[int, int], strides: tuple[int, int], offset: int = 0) -> ExpertPart:
        return ExpertPart(source_idx=source_idx, offset=offset, shape=shape, strides=strides, dtype=name)

    matrix = width_D * width_F
    down = part(1, (width_D, width_F), (width_F, 1))
    if layout == "transposed":
        columns = part(0, (width_D, width_up), (width_up, 1))
        return [width_up * width_D, matrix], (columns,), (part(1, (width_F, width_D), (width_D, 1)),)
    if layout == "turned":
        columns = part(0, (width_up, width_D), (1, width_up))
        return [width_up * width_D, matrix], (columns,), (part(1, (width_D, width_F), (1, width_D)),)
    if layout == "stacked" or not gated:
        return [width_up * width_D, matrix], (part(0, (width_up, width_D), (width_D, 1)),), (down,)
    if layout == "interleaved":
        rows = (part(0, (width_F, width_D), (2 * width_D, 1), offset) for offset in (0, width_D))
        return [2 * matrix, matrix], tuple(rows), (down,)
    assert layout == "published", f"{layout=}"
    up = (part(0, (width_F, width_D), (width_D, 1)), part(2, (width_F, width_D), (width_D, 1)))
    return [matrix, matrix, matrix], up, (down,)


def silu_gate(up: torch.Tensor) -> torch.Tensor:
    gate, up = up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def gelu_gate(up: torch.Tensor) -> torch.Tensor:
    gate, up = up.chunk(2, dim=-1)
    return torch.nn.functional.gelu(gate) * up


def gelu_tanh_gate(up: torch.Tensor) -> torch.Tensor:
    gate, up = up.chunk(2, dim=-1)
    return torch.nn.functional.gelu(gate, approximate="tanh") * up


def clamped_gate(up: torch.Tensor) -> torch.Tensor:
    """gpt-oss: gate and up take turns."""
    gate, up = up[..., ::2].clamp(max=1.5), up[..., 1::2].clamp(-1.5, 1.5)
    return gate * torch.sigmoid(gate * 1.702) * (up + 1)


def late_clamp_gate(up: torch.Tensor) -> torch.Tensor:
    """Step: the gate is clamped after its curve."""
    gate, up = up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate).clamp(max=1.5) * up.clamp(-1.5, 1.5)


def early_clamp_gate(up: torch.Tensor) -> torch.Tensor:
    """DeepSeek V4: both clamped before."""
    gate, up = up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate.clamp(max=1.5)) * up.clamp(-1.5, 1.5)


def unknown_gate(up: torch.Tensor) -> torch.Tensor:
    gate, up = up.chunk(2, dim=-1)
    return torch.sin(gate) * up


def relu_squared(up: torch.Tensor) -> torch.Tensor:
    return torch.relu(up).square()
