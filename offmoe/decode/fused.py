"""One token by one call of the CPU kernels: embedding, all layers, last norm, head.

The call ends early at a layer that lacks one of its experts: this layer's experts are fetched and computed as always,
and the next call goes on behind them. While a lookahead is awake, which must hear of each layer before the next one
begins, every layer is a call of its own.

Concurrency: on the thread that runs the model, and no other. Rows are overwritten by the next token.
"""

from __future__ import annotations

import inspect
import time
import weakref
from collections import deque
from functools import partial
from typing import Any

import torch
from torch import nn

from offmoe.decode.attends import Angles
from offmoe.decode.layers import FusedLayer, LayerWriter
from offmoe.decode.spec import CosSinForm, DecoderSpec, part_of
from offmoe.decode.steps import Steps
from offmoe.hf.door import PreTrainedModel
from offmoe.kernels.cpu.kernels import CpuKernels
from offmoe.kernels.cpu.program import CpuProgram
from offmoe.kv.cache import PreallocatedLayer, can_append
from offmoe.moe.interrupt_safe import FusedExperts, InterruptSafeExecutor

# Name of a rotary module, and the layer type that it is asked for.
RotaryKind = tuple[str, str]
_NO_ANGLES = (torch.empty(0), torch.empty(0))
# Kinds of angles whose frequencies never change: not `dynamic` and `longrope`, which follow the longest position.
_FIXED_KINDS = ("default", "linear", "llama3", "yarn", "proportional")
_BLOCK = 256


class FusedStep:
    """The fused step of one model, made when every layer's experts were seen. Raises NoSpecError where it cannot be.

    Valid as long as the model's modules, and the memory of their weights, stay the same.
    """

    def __init__(
        self, model: PreTrainedModel, decoder: Any, spec: DecoderSpec, executor: InterruptSafeExecutor,
        experts: FusedExperts, kernels: CpuKernels,
    ) -> None:  # fmt: skip
        self._executor, self._experts = executor, experts
        self._embed, modules = decoder.get_input_embeddings(), list(decoder.layers)
        self._decoder = decoder if spec.per_layer else None
        self._kinds, self._angles = _angle_tables(decoder, spec, len(modules))
        dtype = model.dtype
        program = self._program = CpuProgram(kernels, len(modules))
        steps = Steps(kernels, program, spec, dtype)
        writer = LayerWriter(steps, experts)
        width = self._embed.weight.shape[1]
        self._x_1D = row = program.row(width, dtype)
        self.layers: list[FusedLayer] = []
        for layer_idx, module in enumerate(modules):
            output = program.row(width, dtype)
            self.layers.append(writer.write(module, layer_idx, row, output))
            row = output
        head = steps.read.head(model)
        normed = steps.normed(decoder, spec.last_norm, row, program.row(width, dtype))
        self._logits_1V = program.row(head.num_outputs, dtype)
        program.linear(head, normed, self._logits_1V)
        if spec.logits_scale != 1.0:
            program.numbers("scale", self._logits_1V, None, self._logits_1V, scale=spec.logits_scale)
        if spec.logits_cap is not None:
            program.numbers("cap", self._logits_1V, None, self._logits_1V, scale=spec.logits_cap)
        program.finish()
        self._embedding = spec.embedding
        self._form = spec.cos_sin_form
        self._own_angles: dict[RotaryKind, Angles] = {}
        self._moves = [layer.move for layer in self.layers if layer.move is not None]
        self._layer_at = {layer.moe.step: layer for layer in self.layers if layer.moe is not None}
        self._hooks = [
            (layer.layer_idx, module is layer.module, module._forward_pre_hooks, row)
            for layer in self.layers for module, row in layer.seen_by
        ]  # fmt: skip
        self._past: weakref.ref[Any] | None = None

    def takes(self, cache: Any) -> bool:
        """Whether the KV cache is our own with room for one token more, and this engine computes the experts."""
        layers = [] if cache is None else cache.layers
        return (
            len(layers) == len(self.layers)
            and all(map(can_append, self.layers, layers))
            and all(layer.moe is None or layer.moe.binding.executor is self._executor for layer in self.layers)
        )

    def __call__(self, cache: Any, ids: torch.Tensor, position: int, *, count: bool = True) -> torch.Tensor:
        """Logits (1, V) after appending the one token `ids` (1, 1) to `cache`, which holds `position` tokens.

        `takes` said True. Without `count`, experts that are in RAM do not count as used. Raises what experts raise.
        """
        x = self._embed(ids)
        if self._embedding != 1.0:
            x = x * self._embedding
        self._x_1D.copy_(x.view(1, -1))
        if self._decoder is not None:
            self._set_extra(self._decoder.project_per_layer_inputs(x, self._decoder.get_per_layer_inputs(ids, x)))
        positions = torch.tensor([[position]])
        self._open_rows(cache, {kind: table(x, positions) for kind, table in self._angles.items()})
        for move in self._moves:
            move(position)
        told = _Told(self._hooks)
        step, end = 0, len(self._program)
        while step < end:
            if self._experts.is_unwatched:
                stop = self._executor.guard(partial(self._compute, step, count))
            else:
                stop = self._compute_watched(step, told)
            told.up_to(self._layer_at[stop].layer_idx if stop < end else len(self.layers))
            if stop < end:
                self._serve(self._layer_at[stop])
                stop += 1
            step = stop
        return self._logits_1V.clone()

    def _set_extra(self, inputs_11LP: torch.Tensor) -> None:
        """The token's embeddings for each of L layers, of P numbers."""
        for layer, row in zip(self.layers, inputs_11LP[0, 0], strict=True):
            assert layer.extra is not None, f"{layer.layer_idx=}"
            layer.extra.copy_(row[None])

    def _compute(self, begin: int, count: bool) -> int:
        """One call, and its books; the step that it ended at."""
        self._experts.refresh()
        began_ns = time.perf_counter_ns()
        stop = self._program(begin)
        for step, layer in self._layer_at.items() if count else ():
            moe = layer.moe
            if moe is not None and begin <= step < stop:
                chosen_ns, ended_ns = self._program.ended_ns(step - 1), self._program.ended_ns(step)
                self._experts.ran(
                    moe.binding.layer_idx, moe.ids_K[:], moe.route.weights_1K, began_ns + chosen_ns, began_ns + ended_ns
                )
        return stop

    def _compute_watched(self, begin: int, told: _Told) -> int:
        """Compute up to the next layer's experts, in RAM or not; observers are told of each layer's input before it."""
        stop = min((step for step in self._layer_at if step >= begin), default=len(self._program))
        for layer in self.layers:
            if begin < layer.begin <= stop:
                self._program(begin, layer.begin)
                begin = layer.begin
            if begin == layer.begin:
                told.input_of(layer.layer_idx)
        self._program(begin, stop)
        return stop

    def _serve(self, layer: FusedLayer) -> None:
        """The experts of a layer as always: fetched where they are missing."""
        moe = layer.moe
        assert moe is not None and moe.binding.math is not None, f"{layer.layer_idx=}"
        y = self._executor.run_layer(
            moe.binding.layer_idx, moe.binding.math, moe.binding.num_experts, moe.x, moe.route.ids_1K,
            moe.route.weights_1K,
        )  # fmt: skip
        moe.y.copy_(y.view(1, -1))

    def _open_rows(self, cache: Any, angles: dict[RotaryKind, Any]) -> None:
        """One token more in every layer's cache. Whole caches of full attention are only longer than before."""
        is_known = self._set_angles(angles) and self._past is not None and self._past() is cache
        num_rows = self._program.num_rows
        for idx, (layer, rows, kind) in enumerate(zip(self.layers, cache.layers, self._kinds, strict=True)):
            if layer.has_states:
                layer.place(self._own_angles.get(kind, _NO_ANGLES), (rows.conv_states[0], rows.recurrent_states[0]))
            elif not layer.has_rows:
                continue
            elif is_known and isinstance(rows, PreallocatedLayer):
                num_rows[idx] = rows.count_row()
            else:
                buffers = rows.open_row()
                layer.place(self._own_angles.get(kind, _NO_ANGLES), buffers)
                num_rows[idx] = buffers[0].shape[-2]
        self._past = weakref.ref(cache)

    def _set_angles(self, angles: dict[RotaryKind, Any]) -> bool:
        """Copy them to where the layers read them. False where that is another place than for the token before."""
        are_like = True
        for kind, given in angles.items():
            pair, mine = _as_pair(given, self._form), self._own_angles.get(kind)
            if mine is None or [(a.shape, a.dtype) for a in mine] != [(a.shape, a.dtype) for a in pair]:
                mine = self._own_angles[kind] = (torch.empty_like(pair[0]), torch.empty_like(pair[1]))
                are_like = False
            mine[0].copy_(pair[0])
            mine[1].copy_(pair[1])
        return are_like


class _Told:
    """One token's observers: the ObserverHooks of the layers' modules, told in the order of the layers, once each."""

    def __init__(self, hooks: list[tuple[int, bool, dict[int, Any], torch.Tensor]]) -> None:
        self._left = deque(
            (layer_idx, is_input, hook.tell, row)
            for layer_idx, is_input, table, row in hooks for hook in table.values()
        )  # fmt: skip

    def input_of(self, layer_idx: int) -> None:
        """Tell of a layer's input, and of whatever comes before it."""
        while self._left and (self._left[0][0] < layer_idx or self._left[0][:2] == (layer_idx, True)):
            self._tell()

    def up_to(self, layer_idx: int) -> None:
        """Tell of all rows up to those of a layer."""
        while self._left and self._left[0][0] <= layer_idx:
            self._tell()

    def _tell(self) -> None:
        *_, tell, row = self._left.popleft()
        tell(row)


def _angle_tables(
    decoder: Any, spec: DecoderSpec, num_layers: int
) -> tuple[list[RotaryKind], dict[RotaryKind, CosSinTable]]:
    """Each layer's kind of angles, and the table of each kind."""
    if spec.rotary is None:
        return [("", "")] * num_layers, {}
    tables: dict[RotaryKind, CosSinTable] = {}
    kinds: list[RotaryKind] = []
    for layer_idx in range(num_layers):
        name = spec.rotary_of(layer_idx) or ""
        rotary = part_of(decoder, name)
        parameters = set(inspect.signature(rotary.forward).parameters)
        layer_type = decoder.config.layer_types[layer_idx] if "layer_type" in parameters else ""
        kinds.append((name, layer_type))
        if kinds[-1] not in tables:
            tables[kinds[-1]] = CosSinTable(rotary, by_name="position_ids" in parameters, kind=layer_type)
    return kinds, tables


def _as_pair(angles: Any, form: CosSinForm) -> Angles:
    """Cosines and sines as the kernels read them: of complex numbers, or in the form that the spec says."""
    if isinstance(angles, torch.Tensor):
        pairs = torch.view_as_real(angles).flatten(end_dim=-2).float()
        return pairs[:, 0].contiguous(), pairs[:, 1].contiguous()
    cos, sin = angles
    if form == "own":
        return cos, sin
    if form == "every_second":
        return cos.flatten()[::2].float(), sin.flatten()[::2].float()
    half = cos.numel() // 2
    return cos.flatten()[:half].float(), sin.flatten()[:half].float()


class CosSinTable:
    """Rotary angles (cos, sin), each (1, 1, W), of one position, from a table made for many at once.

    The rotary module is ten of torch's operations, a tenth of a millisecond a token when a layer's weights have driven
    them out of the processor's caches. Only modules whose angles depend on the position alone have a table, and each
    part of it is compared with what the module says at the position that was asked for first.
    """

    def __init__(self, rotary: nn.Module, *, by_name: bool, kind: str = "") -> None:
        """`by_name`: `rotary` takes positions by their name. `kind`: of layers, where it has angles for each."""
        self._rotary, self._by_name, self._kind = rotary, by_name, kind
        rope_type: object = getattr(rotary, "rope_type", None)
        rope_type = rope_type.get(kind) if isinstance(rope_type, dict) else rope_type
        self._is_fixed = rope_type in _FIXED_KINDS
        self._frequencies = f"{kind}_inv_freq" if kind else "inv_freq"
        self._known: tuple[object, ...] = ()
        self._table: Angles | None = None

    def __call__(self, x: torch.Tensor, positions: torch.Tensor) -> Angles:
        """Return the angles that the module gives for `positions`, (1, 1), and for the type and device of `x`."""
        rotary = self._rotary
        if not self._is_fixed or rotary._forward_hooks or rotary._forward_pre_hooks or positions.device.type != "cpu":
            return self._ask(x, positions)
        block, at = divmod(int(positions), _BLOCK)
        known = (block, x.dtype, id(getattr(rotary, self._frequencies, None)))
        if known != self._known or self._table is None:
            self._known, self._table = known, None
            own = self._ask(x, positions)
            table = self._ask(x, torch.arange(block * _BLOCK, (block + 1) * _BLOCK, device=positions.device)[None])
            if not all(torch.equal(part[:, at : at + 1], mine) for part, mine in zip(table, own, strict=True)):
                self._is_fixed = False
                return own
            self._table = table
        cos, sin = self._table
        return cos[:, at : at + 1], sin[:, at : at + 1]

    def _ask(self, x: torch.Tensor, positions: torch.Tensor) -> Angles:
        named = {"layer_type": self._kind} if self._kind else {}
        if self._by_name:
            angles: Angles = self._rotary(x, position_ids=positions, **named)
        else:
            angles = self._rotary(x, positions, **named)
        return angles
