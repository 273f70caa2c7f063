"""SlotKernels by Triton: which kernel for how many rows, and indices to the device.

Shapes: N rows, T tokens, K experts a token, E experts, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from offmoe.checkpoint.expert_index import ExpertPart, MoeLayer, QuantPart
from offmoe.formats.dense import torch_dtype
from offmoe.formats.layout import layout_of
from offmoe.kernels.activations import Activation, find_activation
from offmoe.kernels.codes import obstacle
from offmoe.kernels.geometry import Tiling, make_tiles, row_by_row, rows_a_tile
from offmoe.kernels.reference import ExpertMath, combine_rows
from offmoe.kernels.slot_kernels import TorchSlotKernels, look_up
from offmoe.kernels.triton.check import TOLERANCES, LaunchCheck, compile_together, current, failure_of
from offmoe.kernels.triton.launch import LayerKernels

# The oldest that Triton's README names. Turing (7.5) has neither conversions nor products of bfloat16 (PTX ISA: cvt and
# mma of .bf16 need sm_80), and Triton multiplies tiles there without its matrix units: 255 registers, 27 KB spilled a
# thread (benchmarks/2026-11-30-triton-architectures.md). Its kernels for single rows are as good as elsewhere.
WHOLE_CAPABILITY = (8, 0)
_NO_TILES = "several rows of an expert are computed by torch: the device (below 8.0) has no tiles for triton"


class TritonSlotKernels:
    """Triton for the layers that have kernels, `fallback` for the others.

    Few rows are computed one by one: two rows of one slot then share its weights through L2 alone. Where an expert is
    likely to have several rows, they share a tile; where the device has no tiles, `fallback` computes those.
    """

    def __init__(
        self, kernels: Sequence[LayerKernels | None], maths: Sequence[ExpertMath], fallback: TorchSlotKernels,
        slot_of_LE: torch.Tensor | None, missing_L: torch.Tensor | None,
    ) -> None:  # fmt: skip
        self.reasons = fallback.reasons
        self._kernels, self._maths, self._fallback = kernels, maths, fallback
        # Views made once: cutting a tensor costs as much as a launch.
        self._slot_of_E = () if slot_of_LE is None else slot_of_LE.unbind()
        self._missing = () if missing_L is None else [missing_L[idx : idx + 1] for idx in range(len(missing_L))]

    def rows_forward(
        self, layer_idx: int, x_TD: torch.Tensor, token_N: torch.Tensor, slot_N: torch.Tensor, expert_N: torch.Tensor
    ) -> torch.Tensor:
        """See SlotKernels."""
        kernels = self._kernels[layer_idx]
        if kernels is None or not slot_N.numel():
            return self._fallback.rows_forward(layer_idx, x_TD, token_N, slot_N, expert_N)
        return self._rows(layer_idx, kernels, x_TD, token_N, slot_N, expert_N)

    def tokens_forward(
        self, layer_idx: int, x_TD: torch.Tensor, expert_ids_TK: torch.Tensor, slot_TK: torch.Tensor,
        weights_TK: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """See SlotKernels."""
        kernels, math = self._kernels[layer_idx], self._maths[layer_idx]
        if kernels is None:
            return self._fallback.tokens_forward(layer_idx, x_TD, expert_ids_TK, slot_TK, weights_TK)
        top_k = expert_ids_TK.shape[1]
        if math.post_norm is None and row_by_row(len(x_TD), slot_TK.numel(), kernels.num_experts):
            with current(x_TD.device):
                experts, slots = to_device(x_TD.device, expert_ids_TK, slot_TK)
                hidden = kernels.choose(_ready(x_TD, math), top_k, experts, slots)
                return kernels.project_and_sum(hidden, experts, slots, weights_TK.contiguous(), x_TD.dtype)
        token_N = torch.arange(slot_TK.numel(), dtype=torch.int32, device=slot_TK.device) // top_k
        y_ND = self._rows(layer_idx, kernels, x_TD, token_N, slot_TK.reshape(-1), expert_ids_TK.reshape(-1))
        return combine_rows(y_ND, weights_TK, x_TD.dtype)

    def looks_up(self, layer_idx: int) -> bool:
        """See SlotKernels."""
        return self._kernels[layer_idx] is not None

    def has_tiles(self, layer_idx: int) -> bool:
        """See SlotKernels."""
        kernels = self._kernels[layer_idx]
        return kernels is not None and kernels.has_tiles

    def lookup_forward(
        self, layer_idx: int, x_TD: torch.Tensor, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        """See SlotKernels."""
        kernels, math = self._kernels[layer_idx], self._maths[layer_idx]
        if kernels is None:
            return self._fallback.lookup_forward(layer_idx, x_TD, expert_ids_TK, weights_TK)
        slot_of_E, missing = self._slot_of_E[layer_idx], self._missing[layer_idx]
        top_k = expert_ids_TK.shape[1]
        if math.post_norm is None and row_by_row(len(x_TD), expert_ids_TK.numel(), kernels.num_experts):
            experts = expert_ids_TK.contiguous()
            with current(x_TD.device):
                hidden = kernels.choose(_ready(x_TD, math), top_k, experts, slot_of_E, missing=missing)
                return kernels.project_and_sum(
                    hidden, experts, slot_of_E, weights_TK.contiguous(), x_TD.dtype, lookup=True
                )
        slot_TK = look_up(slot_of_E, missing, expert_ids_TK, kernels.num_experts)
        return self.tokens_forward(layer_idx, x_TD, expert_ids_TK, slot_TK, weights_TK)

    def _rows(
        self, layer_idx: int, kernels: LayerKernels, x_TD: torch.Tensor, token_N: torch.Tensor,
        slot_N: torch.Tensor, expert_N: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        math, num_rows, num_experts = self._maths[layer_idx], slot_N.numel(), kernels.num_experts
        is_by_row = row_by_row(len(x_TD), num_rows, num_experts)
        if not is_by_row and not kernels.has_tiles:
            return self._fallback.rows_forward(layer_idx, x_TD, token_N, slot_N, expert_N)
        x_TD = _ready(x_TD, math)
        with current(x_TD.device):
            if is_by_row:
                tokens, slots, experts = to_device(x_TD.device, token_N, slot_N, expert_N)
                y_ND = kernels.project(kernels.choose(x_TD, tokens, experts, slots), experts, slots)
            else:
                tiles = make_tiles(slot_N, rows_a_tile(num_rows, num_experts), num_experts)
                tokens, slots, experts, *tiles_on_device = to_device(x_TD.device, token_N, slot_N, expert_N, *tiles)
                y_ND = kernels.tiles(x_TD, tokens, experts, *tiles_on_device)
            if math.post_norm is not None:  # which may make something of nothing
                y_ND = math.post_norm(y_ND).masked_fill((slots < 0)[:, None], 0.0)
        return y_ND


def to_device(device: torch.device, *indices: torch.Tensor) -> list[torch.Tensor]:
    """Indices as int32 on `device`; those on the host in one copy that it does not wait for.

    The source is pinned by torch's allocator, which keeps it until the copy is done.
    """
    on_host = [tensor for tensor in indices if tensor.device != device]
    pieces: Iterator[torch.Tensor] = iter(())
    if on_host:
        packed = torch.cat([tensor.reshape(-1).to(torch.int32) for tensor in on_host])
        packed = (packed.pin_memory() if device.type == "cuda" else packed).to(device, non_blocking=True)
        pieces = iter(torch.split(packed, [tensor.numel() for tensor in on_host]))
    return [
        tensor.to(torch.int32).contiguous() if tensor.device == device else next(pieces).view(tensor.shape)
        for tensor in indices
    ]


def _ready(x_TD: torch.Tensor, math: ExpertMath) -> torch.Tensor:
    return x_TD.to(math.dtype).contiguous()


def make_triton_kernels(
    layers: Sequence[MoeLayer], maths: Sequence[ExpertMath], slab: torch.Tensor, slot_bytes: int,
    fallback: TorchSlotKernels, slot_of_LE: torch.Tensor | None, missing_L: torch.Tensor | None,
    progress: Callable[[int, int], None],
) -> TritonSlotKernels:  # fmt: skip
    """Kernels for every layer that Triton can compute. Layers that are alike are compiled and tried once."""
    tiling, kernels = tiling_of(slab.device), list[LayerKernels | None]()
    checks: dict[object, LaunchCheck] = {}
    kind_of: dict[int, object] = {}
    capability = torch.cuda.get_device_capability(slab.device) if slab.device.type == "cuda" else None
    for layer_idx, (layer, math) in enumerate(zip(layers, maths, strict=True)):
        reason = _obstacle(layer, math, capability)
        made = None
        if reason is None:
            activation = _activation_of(layer, math, slab.device)
            made = LayerKernels(layer, layout_of(layer), math, activation, slab, slot_bytes, tiling)
            kind: object = (made.geometry(), layer.num_experts, layer.top_k)
            kind_of[layer_idx] = kind
            if kind not in checks:
                checks[kind] = LaunchCheck(made, layer, math, slab, slot_bytes)
            if not tiling.has_tiles:
                reason = _NO_TILES
        kernels.append(made)
        if reason is not None:
            fallback.reasons[layer_idx] = reason
    with current(slab.device):
        compile_together(list(checks.values()), progress)
        failures = {kind: failure_of(check) for kind, check in checks.items()}
    for layer_idx, kind in kind_of.items():
        if (failure := failures[kind]) is not None:
            kernels[layer_idx], fallback.reasons[layer_idx] = None, failure
    if slab.device.type == "cuda":  # a check that failed half-way has kernels queued, and slots are filled from now on
        torch.cuda.synchronize(slab.device)
    return TritonSlotKernels(kernels, maths, fallback, slot_of_LE, missing_L)


def tiling_of(device: torch.device) -> Tiling:
    """Block sizes for a device: stages as its shared memory allows, tiles where they are fast."""
    if device.type != "cuda":
        return Tiling()
    properties = torch.cuda.get_device_properties(device)
    return Tiling(
        shared_bytes=getattr(properties, "shared_memory_per_block_optin", Tiling().shared_bytes),
        has_tiles=(properties.major, properties.minor) >= WHOLE_CAPABILITY,
    )


def _activation_of(layer: MoeLayer, math: ExpertMath, device: torch.device) -> Activation | None:
    width_F = layer.width(layer.down[0])
    widths = (part.shape[1 if layer.transposed and isinstance(part, ExpertPart) else 0] for part in layer.up)
    gated = sum(widths) == 2 * width_F
    return find_activation(math.activate, width_F, gated=gated, device=device)


def _obstacle(layer: MoeLayer, math: ExpertMath, capability: tuple[int, int] | None) -> str | None:
    if math.dtype == torch.bfloat16 and capability is not None and capability < WHOLE_CAPABILITY:
        major, minor = capability
        return f"the device (compute capability {major}.{minor}) has no bfloat16: 8.0 is the first that has"
    if math.dtype not in TOLERANCES:
        return f"it is computed in {str(math.dtype).removeprefix('torch.')}"
    plain = [part for part in (*layer.up, *layer.down) if isinstance(part, ExpertPart)]
    stored = {torch_dtype(part.dtype, where=layer.name) for part in plain}
    if stored and stored != {math.dtype}:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in sorted(stored, key=str))
        return f"weights are {names}, computed in {str(math.dtype).removeprefix('torch.')}"
    reasons = (obstacle(part) for part in (*layer.up, *layer.down) if isinstance(part, QuantPart))
    return next((reason for reason in reasons if reason is not None), None)
