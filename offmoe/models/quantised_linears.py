"""Resident linears that stay quantised in RAM, as the checkpoint has them: a token reads half of the bytes, or less.

For a few rows the CPU kernels multiply with the codes; for more, blocks of rows are turned into values on the way. The
codes are buffers of the module, so that they are counted with the resident weights. `module.weight` is left as a tensor
without memory, of the right shape and type.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel

from offmoe.base.shape import LATENT_MATRIX
from offmoe.checkpoint.index import CheckpointIndex
from offmoe.checkpoint.quantised import QuantEntry
from offmoe.formats.quantised import QuantMatrix
from offmoe.kernels.cpu.decode import CpuLinear
from offmoe.kernels.cpu.kernels import CpuKernels
from offmoe.kernels.cpu.matrices import knows, unreadable
from offmoe.models.native import MATRIX_NAME, MAX_ROWS
from offmoe.models.stored import read_matrix, values_of
from offmoe.models.transformers_internals import Target

_BUFFERS = ("offmoe_codes", "offmoe_scales", "offmoe_zeros")


class QuantisedLinears:
    """The linears of a model on the meta device whose weights stay as the checkpoint has them. `keys` are theirs."""

    def __init__(
        self, model: PreTrainedModel, index: CheckpointIndex, targets: dict[str, Target], kernels: CpuKernels
    ) -> None:
        """Takes the weights out of the modules. Call `read` before anything else is loaded."""
        self._kernels, self._dtype = kernels, model.dtype
        self._found: list[tuple[nn.Linear, QuantEntry]] = []
        self.keys: set[str] = set()
        keys_of: dict[str, list[str]] = {}
        for key, target in targets.items():
            keys_of.setdefault(target.param, []).append(key)
        for name, module in model.named_modules():
            keys = keys_of.get(f"{name}.weight", [])
            entry = index.tensors[keys[0]] if len(keys) == 1 else None
            tied = f"{name}.weight" in model.all_tied_weights_keys
            if type(module) is not nn.Linear or not isinstance(entry, QuantEntry) or tied or not knows(entry.format):
                continue
            if name.endswith(LATENT_MATRIX):  # it is needed from both sides
                continue
            if targets[keys[0]].pattern is None and entry.shape == module.weight.shape:
                self._take(module, entry)
                self.keys.add(keys[0])

    def _take(self, module: nn.Linear, entry: QuantEntry) -> None:
        dtype = module.weight.dtype
        del module._parameters["weight"]
        module.__dict__["weight"] = torch.empty(entry.shape, dtype=dtype, device="meta")
        for name, stored in zip(_BUFFERS, entry.stored, strict=False):
            codes = torch.empty(stored.num_bytes, dtype=torch.uint8, device="meta")
            module.register_buffer(name, codes, persistent=False)
        self._found.append((module, entry))

    def read(self, index: CheckpointIndex) -> None:
        """Read the codes. A linear that the kernels cannot read gets its values after all."""
        for module, entry in self._found:
            matrix = read_matrix(index, entry)
            if unreadable(matrix, self._dtype) is not None:
                _give_values(module, matrix)
                continue
            for name, tensor in zip(_BUFFERS, (matrix.codes, matrix.scales, matrix.zeros), strict=True):
                if tensor is not None:
                    module.register_buffer(name, tensor, persistent=False)
            module.__dict__[MATRIX_NAME] = matrix
            module.__dict__["forward"] = _forward_of(self._kernels, module, matrix)


def _give_values(module: nn.Linear, matrix: QuantMatrix) -> None:
    dtype = module.__dict__.pop("weight").dtype
    for name in _BUFFERS:
        module._buffers.pop(name, None)
        module._non_persistent_buffers_set.discard(name)
    module.weight = nn.Parameter(values_of(matrix, dtype), requires_grad=False)


def _forward_of(kernels: CpuKernels, module: nn.Linear, matrix: QuantMatrix) -> Callable[[torch.Tensor], torch.Tensor]:
    dtype = module.__dict__["weight"].dtype
    linear: CpuLinear | None = None

    def forward(input: torch.Tensor) -> torch.Tensor:  # noqa: A002  # its name in nn.Linear
        nonlocal linear
        bias = module.bias
        if linear is None and (bias is None or not bias.is_meta):
            linear = CpuLinear(kernels, matrix, None if bias is None else bias.detach(), dtype=dtype)
        few = input.numel() <= MAX_ROWS * matrix.shape[1]
        if linear is not None and few and linear.takes(input) and not torch.compiler.is_dynamo_compiling():
            return linear(input)
        blocks = [
            nn.functional.linear(input, matrix.dequantise(input.dtype, rows), None if bias is None else bias[rows])
            for rows in matrix.row_blocks()
        ]
        return torch.cat(blocks, dim=-1)

    return forward
