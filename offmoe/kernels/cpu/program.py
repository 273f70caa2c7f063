"""One token through a decoder as one call of the library: a list of steps that is made once and run for every token.

Everything that stays the same from token to token is written down once: rows, weights, the table that says where each
expert lies. Between two tokens only the rotary angles and the caches' numbers of rows are set, so that a token touches
few of Python's objects, which the weights of a layer have driven out of the processor's caches.

Shapes: D model width, E experts, K experts a token, N outputs of a linear.
"""

from __future__ import annotations

import ctypes
from typing import Literal

import torch

from offmoe.kernels.activations import Activation
from offmoe.kernels.cpu import structs
from offmoe.kernels.cpu.decode import CpuAttention, CpuLinear, CpuNorm, CpuTokenExperts
from offmoe.kernels.cpu.delta import CpuDelta, DeltaInput
from offmoe.kernels.cpu.kernels import CpuKernels, describe_activation
from offmoe.kernels.cpu.latent import ROTATIONS, CpuLatentAttention, Rotation
from offmoe.kernels.cpu.layer import CpuRoute, CpuTokenLayer
from offmoe.kernels.cpu.mamba import CpuMamba
from offmoe.kernels.cpu.mlp import CpuMlp
from offmoe.kernels.cpu.short_conv import CpuShortConv

Elementwise = Literal["sum", "gate", "scale", "cap", "clamp", "multiply", "gate_softplus"]
_ELEMENTWISE: dict[Elementwise, int] = {
    "sum": 0, "gate": 1, "scale": 2, "cap": 3, "clamp": 4, "multiply": 5, "gate_softplus": 6,
}  # fmt: skip
_KINDS = {
    name: kind
    for kind, name in enumerate(
        (
            "layer", "norm", "linear", "attend", "latent", "choose", "experts", "mlp", "numbers", "copy", "delta",
            "conv", "activate", "mamba",
        )
    )
}  # fmt: skip
Table = ctypes.Array[ctypes.c_void_p]


class CpuProgram:
    """Steps in the order in which they were added, for one token. Serves one thread at a time.

    Rows are (1, width) tensors that the program owns (`row`) or that were given; the next call overwrites them.
    """

    def __init__(self, kernels: CpuKernels, num_caches: int) -> None:
        """`num_caches`: attention layers, whose numbers of rows stand in `num_rows`."""
        self._kernels = kernels
        self._steps: list[tuple[int, object, int | None]] = []
        self._keep: list[object] = []
        self.num_rows = (ctypes.c_int64 * num_caches)()
        self._ops = (structs.COp * 0)()
        self._call = structs.CProgram()

    def __len__(self) -> int:
        return len(self._steps)

    def row(self, width: int, dtype: torch.dtype) -> torch.Tensor:
        """A new row."""
        row = torch.zeros(1, width, dtype=dtype)
        self._keep.append(row)
        return row

    def norm(self, norm: CpuNorm, x: torch.Tensor, y: torch.Tensor) -> None:
        """y = norm(x). Several norms one after another where x is several times as wide as the weight."""
        width = norm.weight_D.numel()
        assert x.numel() == y.numel() and x.numel() % width == 0 and x.dtype == y.dtype == norm.weight_D.dtype
        call = structs.CNorm.from_buffer_copy(norm.call)
        call.x, call.y, call.rows = x.data_ptr(), y.data_ptr(), x.numel() // width
        self._add("norm", call, norm, x, y)

    def linear(self, linear: CpuLinear, x: torch.Tensor, y: torch.Tensor) -> None:
        """y = linear(x); x may be of another type than the linear computes in."""
        assert x.numel() == linear.num_inputs and y.numel() == linear.num_outputs and y.dtype == linear.dtype
        call = structs.CLinear.from_buffer_copy(linear.call)
        call.x, call.y, call.num_x = x.data_ptr(), y.data_ptr(), 1
        call.x_type, call.x_row_bytes = structs.TYPES[x.dtype], x.numel() * x.element_size()
        self._add("linear", call, linear, x, y)

    def layer(self, layer: CpuTokenLayer, cache_idx: int, x: torch.Tensor, state: torch.Tensor) -> structs.CAttend:
        """Norm, attention, sum, norm and router of a common layer; what follows reads `layer.normed_1D` and its route.

        Returns the struct whose angles and cache are to be set (`set_position`).
        """
        call = layer.call_between(x, state)
        self._add("layer", call, layer, x, state, cache_idx=cache_idx)
        attend: structs.CAttend = call.attend
        return attend

    def attend(
        self, attention: CpuAttention, cache_idx: int, projected: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        y: torch.Tensor,
    ) -> structs.CAttend:  # fmt: skip
        """Attention of projected query, key and value. Returns the struct as `layer` does."""
        call = structs.CAttend.from_buffer_copy(attention.struct)
        call.query, call.key, call.value = (row.data_ptr() for row in projected)
        call.output = y.data_ptr()
        self._add("attend", call, attention, projected, y, cache_idx=cache_idx)
        return call

    def latent(
        self, attention: CpuLatentAttention, cache_idx: int, query: torch.Tensor, compressed: torch.Tensor,
        y: torch.Tensor, rotation: Rotation,
    ) -> structs.CLatent:  # fmt: skip
        """Attention to latents. Returns the struct whose angles and cache are to be set."""
        call = attention.call_between(query, compressed, y)
        call.rotation = ROTATIONS[rotation]
        self._add("latent", call, attention, query, compressed, y, cache_idx=cache_idx)
        return call

    def delta(self, delta: CpuDelta, inputs: dict[str, DeltaInput], y: torch.Tensor) -> structs.CDelta:
        """y = a gated delta net's heads. Returns the struct whose states are to be set (`set_states`)."""
        call = delta.call_between(inputs, y)
        self._add("delta", call, delta, list(inputs.values()), y)
        return call

    def conv(self, conv: CpuShortConv, x: torch.Tensor, y: torch.Tensor) -> structs.CShortConv:
        """y = a gated short convolution of x. Returns the struct whose state is to be set."""
        call = conv.call_between(x, y)
        self._add("conv", call, conv, x, y)
        return call

    def mamba(self, mamba: CpuMamba, x: torch.Tensor, y: torch.Tensor) -> structs.CMamba:
        """y = a Mamba-2 mixer's heads. Returns the struct whose states are to be set."""
        call = mamba.call_between(x, y)
        self._add("mamba", call, mamba, x, y)
        return call

    def activate(self, activation: Activation, gate: torch.Tensor, up: torch.Tensor, to: torch.Tensor) -> None:
        """`to` = f(gate) * up."""
        assert gate.shape == up.shape == to.shape and gate.dtype == up.dtype == to.dtype, f"{gate.shape=} {up.shape=}"
        struct = describe_activation(activation)
        call = structs.CActivate(
            activation=ctypes.addressof(struct), gate=gate.data_ptr(), up=up.data_ptr(), to=to.data_ptr(),
            count=gate.numel(), type=structs.TYPES[gate.dtype],
        )  # fmt: skip
        self._add("activate", call, struct, gate, up, to)

    def copy(self, x: torch.Tensor, begin: int, stride: int, to: torch.Tensor, width: int) -> None:
        """`to` = pieces of `width` numbers of x, which begin at `begin`, `begin` + `stride`, ..."""
        rows, size = to.numel() // width, x.element_size()
        assert begin + (rows - 1) * stride + width <= x.numel() and x.dtype == to.dtype, f"{x.shape=} {to.shape=}"
        call = structs.CCopy(
            x=x.data_ptr() + begin * size, to=to.data_ptr(), rows=rows, row_bytes=width * size, x_stride=stride * size
        )
        self._add("copy", call, x, to)

    def choose(self, route: CpuRoute, logits: torch.Tensor) -> None:
        """The router's choice, in `route.ids_1K` and `route.weights_1K`, from its logits (1, E)."""
        assert logits.numel() == route.rule.num_experts and logits.dtype == route.logits_dtype, f"{logits.shape=}"
        scores = torch.empty(4 * logits.numel())
        call = structs.CChoice(
            route=ctypes.addressof(route.struct), logits=logits.data_ptr(), scores=scores.data_ptr()
        )  # fmt: skip
        self._add("choose", call, route, logits, scores)

    def experts(
        self, experts: CpuTokenExperts, route: CpuRoute, table_E: Table, x: torch.Tensor, y: torch.Tensor
    ) -> int:
        """y = the weighted sum of the chosen experts. `table_E`: where each is described, null where it is not in RAM;
        its owner keeps it true. Returns the step's number: a call ends there when one of them is missing.
        """
        assert len(table_E) == route.rule.num_experts, f"{route.rule=}"
        chosen_K = (ctypes.c_void_p * route.rule.top_k)()
        inner = experts.call_between(x, route.weights_1K, y, chosen_K)
        call = structs.CLookup(
            experts=ctypes.addressof(inner), ids=route.ids_1K.data_ptr(), table=ctypes.addressof(table_E),
            chosen=ctypes.addressof(chosen_K),
        )  # fmt: skip
        return self._add("experts", call, experts, route, table_E, x, y, chosen_K, inner)

    def mlp(self, mlp: CpuMlp, x: torch.Tensor, y: torch.Tensor) -> None:
        """y = mlp(x)."""
        self._add("mlp", mlp.call_between(x, y), mlp, x, y)

    def numbers(
        self, what: Elementwise, x: torch.Tensor, y: torch.Tensor | None, to: torch.Tensor, scale: float = 1.0
    ) -> int:
        """Elementwise arithmetic, each step rounded to the rows' type; see `Elementwise` in abi.h. Returns the step's
        number.
        """
        assert x.numel() == to.numel() and x.dtype == to.dtype and x.is_contiguous() and to.is_contiguous()
        assert y is None or (y.dtype == x.dtype and x.numel() % y.numel() == 0 and y.is_contiguous()), f"{y=}"
        call = structs.CNumbers(
            x=x.data_ptr(), y=None if y is None else y.data_ptr(), to=to.data_ptr(), count=x.numel(),
            y_count=0 if y is None else y.numel(), scale=scale, what=_ELEMENTWISE[what], type=structs.TYPES[x.dtype],
        )  # fmt: skip
        return self._add("numbers", call, x, y, to)

    def _add(self, kind: str, call: ctypes.Structure, *keep: object, cache_idx: int | None = None) -> int:
        self._steps.append((_KINDS[kind], call, cache_idx))
        self._keep.append(keep)
        return len(self._steps) - 1

    def finish(self) -> None:
        """No step comes after this; now it can be called."""
        self._ops = (structs.COp * len(self._steps))()
        for op, (kind, call, cache_idx) in zip(self._ops, self._steps, strict=True):
            op.kind, op.call = kind, ctypes.addressof(call)  # type: ignore[arg-type]
            if cache_idx is not None:
                op.num_rows = ctypes.addressof(self.num_rows) + cache_idx * ctypes.sizeof(ctypes.c_int64)
        self._call.ops = ctypes.addressof(self._ops)

    def __call__(self, begin: int, end: int | None = None) -> int:
        """Compute the steps from `begin` up to `end` (None: all). Returns the number of the experts' step at which it
        stopped because one of them is not in RAM, else `end`. Raises MemoryError.
        """
        call = self._call
        call.begin, call.end = begin, len(self._ops) if end is None else end
        return self._kernels.run_program(ctypes.addressof(call))

    def ended_ns(self, step: int) -> int:
        """When the step ended, since the call began that computed it."""
        ended_ns: int = self._ops[step].ended_ns
        return ended_ns
