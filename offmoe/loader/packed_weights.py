"""Resident bfloat16 matrices packed without loss: linears, the head and the embedding, after they were read.

A token reads a quarter less of them, and slots get the memory. They keep their bits, and a row's product its sum. What
has too many escapes stays as it is, and so do small matrices.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel

from offmoe.formats.packed_sizes import LEAST_NUMBERS, place_matrices
from offmoe.formats.packed_slot import num_escapes, view_packed
from offmoe.formats.quantised import QuantMatrix
from offmoe.kernels.cpu.kernels import CpuKernels
from offmoe.kernels.cpu.packing import CpuPacker
from offmoe.loader.quantised_linears import QuantisedLinear
from offmoe.memory.shape import LATENT_MATRIX
from offmoe.tiers.huge_pages import forget, huge_memory

# Rows that one thread packs at a time.
_STEP_NUMBERS = 1 << 20


class PackedWeight(torch.Tensor):
    """A packed matrix as a parameter: its shape and type cost nothing, and whatever reads its values unpacks it."""

    matrix: QuantMatrix

    @staticmethod
    def __new__(cls, matrix: QuantMatrix) -> PackedWeight:
        """Without memory of its own."""
        found: PackedWeight = torch.Tensor._make_wrapper_subclass(
            cls, matrix.shape, dtype=torch.bfloat16, device=torch.device("cpu"), requires_grad=False
        )
        found.matrix = matrix
        return found

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].matrix)
        args, kwargs = tree_map_only(cls, _values, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"<PackedWeight {list(self.shape)}>"

    @property
    def stored_bytes(self) -> int:
        """Bytes in memory."""
        parts = (self.matrix.codes, self.matrix.scales, self.matrix.zeros)
        return sum(part.nbytes for part in parts if part is not None)


def _values(weight: PackedWeight) -> torch.Tensor:
    return weight.matrix.dequantise(torch.bfloat16)


class PackedLinear(QuantisedLinear):
    """A linear whose weight is packed."""

    def __init__(self, original: nn.Linear, weight: nn.Parameter, kernels: CpuKernels) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = original.in_features, original.out_features
        self.register_parameter("weight", weight)
        self.register_parameter("bias", original.bias)
        self._kernels, self._linear = kernels, None
        self.quant_matrix = _matrix_of(weight)


class PackedEmbedding(nn.Embedding):
    """An embedding whose rows are unpacked when they are asked for. Made of another, whose settings it keeps."""

    def __init__(self, original: nn.Embedding, weight: nn.Parameter) -> None:
        nn.Module.__init__(self)
        self.__dict__.update({name: value for name, value in original.__dict__.items() if name != "_parameters"})
        self.__dict__["_parameters"] = {}
        self.register_parameter("weight", weight)

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  # its name in nn.Embedding
        """Rows of the ids, (..., D)."""
        ids, matrix = input.flatten().tolist(), _matrix_of(self.weight)
        rows = {idx: matrix.dequantise(torch.bfloat16, slice(idx, idx + 1)) for idx in set(ids)}
        found = [rows[idx] for idx in ids] or [torch.empty(0, self.embedding_dim, dtype=torch.bfloat16)]
        return torch.cat(found).view(*input.shape, self.embedding_dim)


def _matrix_of(weight: torch.Tensor) -> QuantMatrix:
    assert isinstance(weight, PackedWeight), f"{type(weight)=}"
    return weight.matrix


class WeightPacker:
    """Puts packed modules in the place of those whose weights gain by it, as they are read.

    `routers`: the numbers of experts of the model's layers. A linear of so many outputs is a router, which others read.
    """

    def __init__(self, model: PreTrainedModel, kernels: CpuKernels, *, routers: set[int]) -> None:
        self._model, self._kernels, self._routers = model, kernels, routers
        self._packer = CpuPacker(kernels)
        self._wide: set[int] = set()  # weights with too many escapes, by their address

    def foreseen(self) -> tuple[int, int]:
        """Bytes that packing will save of a model on the meta device, and those of the largest matrix."""
        saved, largest, seen = 0, 0, set[int]()
        kept = {id(p) for name, module in self._model.named_modules() if not _may_pack(name, module)
                for p in module.parameters(recurse=False)}  # fmt: skip
        for name, module in self._model.named_modules():
            if not _may_pack(name, module):
                continue
            weight: Any = module.weight
            tied = f"{name}.weight" in self._model.all_tied_weights_keys or id(weight) in seen
            seen.add(id(weight))
            if tied or id(weight) in kept or len(weight) in self._routers or not _may_gain(weight):
                continue
            saved += weight.nbytes - place_matrices([(weight.shape[0], weight.shape[1])])[1]
            largest = max(largest, weight.nbytes)
        return saved, largest

    @torch.inference_mode()
    def pack_loaded(self) -> None:
        """Pack what is there by now. The numbers of the plain matrices are given back row by row."""
        others = self._read_by_others()
        for name, module in list(self._model.named_modules()):
            if not _may_pack(name, module):
                continue
            weight: Any = module.weight
            if not is_packed(weight) and _storage(weight) in others:
                continue
            packed = weight if is_packed(weight) else self._packed(weight)
            if packed is not None:
                parent, _, own = name.rpartition(".")
                setattr(self._model.get_submodule(parent), own, _packed_module(module, packed, self._kernels))

    def _read_by_others(self) -> set[int]:
        """Memory that belongs to modules that stay as they are, or to several parameters: it must not be given back."""
        others, owner = set[int](), dict[int, int]()
        for name, module in self._model.named_modules():
            stays = not _may_pack(name, module)
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                if is_packed(tensor) or tensor.is_meta:
                    continue
                storage = _storage(tensor)
                if stays or owner.setdefault(storage, id(tensor)) != id(tensor):
                    others.add(storage)
        return others

    def _packed(self, weight: nn.Parameter) -> nn.Parameter | None:
        if len(weight) in self._routers or not _gains(weight) or weight.data_ptr() in self._wide:
            return None
        found = self._pack(weight.detach())
        if found is None:
            self._wide.add(weight.data_ptr())
        return found

    def _pack(self, weight: torch.Tensor) -> nn.Parameter | None:
        """`weight` packed, and its own memory given back on the way; None where it has too many escapes.

        They are counted first, so that what does not fit stays as it is.
        """
        num_rows, columns = weight.shape
        (place,), num_bytes = place_matrices([(num_rows, columns)])
        step = max(1, _STEP_NUMBERS // columns)
        begins, values = range(0, num_rows, step), weight.data_ptr()

        def count(begin: int) -> int:
            rows = min(step, num_rows - begin)
            (small,), small_bytes = place_matrices([(rows, columns)])
            scratch = torch.zeros(small_bytes, dtype=torch.uint8)
            self._packer.pack(values + 2 * begin * columns, 0, rows, small, scratch.data_ptr())
            return num_escapes(small, scratch)

        def pack(begin: int) -> None:
            rows, address = min(step, num_rows - begin), values + 2 * begin * columns
            self._packer.pack(address, begin, begin + rows, place, memory.data_ptr())
            forget(address, 2 * rows * columns)

        with ThreadPoolExecutor(self._kernels.num_threads) as threads:
            if sum(threads.map(count, begins)) > place.most_escapes:
                return None
            made = huge_memory(num_bytes)
            memory = torch.zeros(num_bytes, dtype=torch.uint8) if made is None else made
            list(threads.map(pack, begins))
        with torch.inference_mode(mode=False):
            return nn.Parameter(PackedWeight(view_packed(place, memory, self._packer.unpack)), requires_grad=False)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def is_packed(weight: object) -> bool:
    """Whether it is a packed parameter."""
    return isinstance(weight, PackedWeight)


def _packed_module(module: nn.Module, weight: nn.Parameter, kernels: CpuKernels) -> nn.Module:
    if isinstance(module, nn.Linear):
        return PackedLinear(module, weight, kernels)
    assert isinstance(module, nn.Embedding)
    kind = type(module)
    if kind is nn.Embedding:
        return PackedEmbedding(module, weight)
    # One that scales what it finds, say: its own forward, on unpacked rows.
    own: type[PackedEmbedding] = type(f"Packed{kind.__name__}", (kind, PackedEmbedding), {"__module__": __name__})
    found = own.__new__(own)
    PackedEmbedding.__init__(found, module, weight)
    return found


def _may_pack(name: str, module: nn.Module) -> bool:
    plain = type(module) is nn.Linear or (isinstance(module, nn.Embedding) and not isinstance(module, PackedEmbedding))
    return plain and not name.endswith(LATENT_MATRIX)


def _gains(weight: torch.Tensor) -> bool:
    return weight.device.type == "cpu" and weight.is_contiguous() and _may_gain(weight)


def _may_gain(weight: torch.Tensor) -> bool:
    return weight.dim() == 2 and weight.dtype == torch.bfloat16 and weight.numel() >= LEAST_NUMBERS
