"""Resident linears that stay quantised in RAM, as the checkpoint has them: a token reads half of the bytes, or less.

For a few rows the CPU kernels multiply with the codes; for more, blocks of rows are turned into values on the way. The
codes are buffers of the module, so that they are counted with the resident weights.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from offmoe.checkpoint.index import CheckpointIndex
from offmoe.checkpoint.quantised import QuantEntry
from offmoe.formats.quantised import QuantMatrix
from offmoe.hf.internals import Target
from offmoe.hf.replace import KernelLinear
from offmoe.hf.stored import read_matrix, values_of
from offmoe.kernels.cpu.decode import CpuLinear
from offmoe.kernels.cpu.kernels import CpuKernels
from offmoe.kernels.cpu.matrices import knows, unreadable
from offmoe.kernels.products import most_rows, multiply
from offmoe.kernels.row_blocks import in_row_blocks
from offmoe.memory.shape import LATENT_MATRIX

# A packed matrix of no more bytes is unpacked whole for a product of many rows.
WHOLE_BYTES = 64 << 20
_BUFFERS = ("offmoe_codes", "offmoe_scales", "offmoe_zeros")


class QuantisedLinears:
    """The linears of a model on the meta device whose weights stay as the checkpoint has them. `keys` are theirs."""

    def __init__(
        self, model: PreTrainedModel, index: CheckpointIndex, targets: dict[str, Target], kernels: CpuKernels
    ) -> None:
        """Replaces the modules. Call `read` before anything else is loaded."""
        self._dtype = model.dtype
        self._found: list[tuple[nn.Module, str, QuantisedLinear, QuantEntry]] = []
        self.keys: set[str] = set()
        keys_of: dict[str, list[str]] = {}
        for key, target in targets.items():
            keys_of.setdefault(target.param, []).append(key)
        for name, module in list(model.named_modules()):
            keys = keys_of.get(f"{name}.weight", [])
            entry = index.tensors[keys[0]] if len(keys) == 1 else None
            tied = f"{name}.weight" in model.all_tied_weights_keys
            if type(module) is not nn.Linear or not isinstance(entry, QuantEntry) or tied or not knows(entry.format):
                continue
            if name.endswith(LATENT_MATRIX):  # it is needed from both sides
                continue
            if targets[keys[0]].pattern is None and entry.shape == module.weight.shape:
                parent, linear = model.get_submodule(name.rpartition(".")[0]), QuantisedLinear(module, entry, kernels)
                setattr(parent, name.rpartition(".")[2], linear)
                self._found.append((parent, name.rpartition(".")[2], linear, entry))
                self.keys.add(keys[0])

    def read(self, index: CheckpointIndex) -> None:
        """Read the codes. A linear that the kernels cannot read gets its values after all."""
        for parent, name, linear, entry in self._found:
            matrix = read_matrix(index, entry)
            if unreadable(matrix, self._dtype) is None:
                linear.set_matrix(matrix)
            else:
                setattr(parent, name, linear.with_values(matrix))


class QuantisedLinear(KernelLinear):
    """A linear without bias or with one, whose weight is a matrix of codes. `weight` has a shape and a type only."""

    def __init__(self, original: nn.Linear, entry: QuantEntry, kernels: CpuKernels) -> None:
        """`original` is on the meta device, and so are the codes until `set_matrix`."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = original.in_features, original.out_features
        self.__dict__["weight"] = torch.empty(entry.shape, dtype=original.weight.dtype, device="meta")
        self.register_parameter("bias", original.bias)
        for name, stored in zip(_BUFFERS, entry.stored, strict=False):
            codes = torch.empty(stored.num_bytes, dtype=torch.uint8, device="meta")
            self.register_buffer(name, codes, persistent=False)
        self._kernels = kernels
        self._linear: CpuLinear | None = None

    def set_matrix(self, matrix: QuantMatrix) -> None:
        """The codes are read."""
        for name, tensor in zip(_BUFFERS, (matrix.codes, matrix.scales, matrix.zeros), strict=True):
            if tensor is not None:
                self.register_buffer(name, tensor, persistent=False)
        self.quant_matrix = matrix

    def with_values(self, matrix: QuantMatrix) -> nn.Linear:
        """A linear of the values of `matrix`, and of this one's bias."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(values_of(matrix, self.weight.dtype), requires_grad=False)
        linear.register_parameter("bias", self.bias)
        return linear

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  # its name in nn.Linear
        """Multiply like nn.Linear: (..., K) to (..., N)."""
        matrix, bias = self.quant_matrix, self.bias
        if matrix is None:  # on the meta device
            return nn.functional.linear(input, self.weight, bias)
        if (result := in_row_blocks(self.forward, input)) is not None:
            return result
        if self._linear is None and (bias is None or not bias.is_meta):
            dtype = self.weight.dtype
            self._linear = CpuLinear(self._kernels, matrix, None if bias is None else bias.detach(), dtype=dtype)
        linear = None if torch.compiler.is_dynamo_compiling() else self._linear
        if linear is not None and linear.takes(input):
            few = input.numel() <= most_rows(input.dtype, in_tiles=linear.in_tiles) * linear.num_inputs
            if few:
                return linear(input)
        if matrix.format.is_lossless and 2 * matrix.shape[0] * matrix.shape[1] <= WHOLE_BYTES:
            return multiply(input, matrix.dequantise(input.dtype), bias)  # as if it were not packed
        blocks = [
            multiply(input, matrix.dequantise(input.dtype, rows), None if bias is None else bias[rows])
            for rows in matrix.row_blocks()
        ]
        return torch.cat(blocks, dim=-1)
