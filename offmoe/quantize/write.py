"""A smaller checkpoint from a larger one: experts (and other linear layers, if asked) as integers, the rest as it is.

The result is compressed-tensors' `pack-quantized`, which other engines read too. Everything streams: of the source a
few pieces of at most 16 MiB are in memory at once, of the result the codes and scales of a few matrices. Reading, the
search for scales (in C++ on all cores where the kernels are there, else with PyTorch) and writing each have a thread.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from offmoe.checkpoint.background import Stages
from offmoe.checkpoint.copies import PIECE_BYTES, copied, small_files, source_identity
from offmoe.checkpoint.gguf.file import is_gguf
from offmoe.checkpoint.index import CheckpointIndex, read_config
from offmoe.checkpoint.json_file import read_json
from offmoe.checkpoint.tensor_entry import TensorEntry
from offmoe.checkpoint.writer import CONFIG_NAME, CheckpointWriter, refuse_target
from offmoe.core.errors import UsageError
from offmoe.core.progress import Progress
from offmoe.formats.dense import TORCH_DTYPES, writable_bytes
from offmoe.hf.device_failures import explained
from offmoe.hf.expert_map import map_experts
from offmoe.hf.internals import KeyMapping
from offmoe.kernels.cpu import CpuKernels, load_cpu_kernels
from offmoe.kernels.cpu.quantise import encode_by_library
from offmoe.loader.build import build_on_meta, read_model_config
from offmoe.machine.memory import num_cores
from offmoe.quantize.plan import SHARD_BYTES, IntegerFormat, PlannedMatrix, QuantisePlan, ShardPlan, plan_quantization
from offmoe.quantize.repack import Scheme, find_scheme, repack_checkpoint

_BITS = {"int4": 4, "int8": 8}


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantiseOptions:
    """`expert_format`, `dense` (other linear layers) and `head` (the output head) are formats, None for what stays;
    `group` columns share a scale.
    """

    expert_format: IntegerFormat
    dense: IntegerFormat | None = None
    head: IntegerFormat | None = None
    group: int = 32
    trust_remote_code: bool = False
    shard_bytes: int = SHARD_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantiseResult:
    """Sizes are bytes of all tensors; `num_dense` counts the linear layers besides experts, `resumed` shards kept.
    `repacked` counts matrices that were quantised before, and keep their values.
    """

    source_bytes: int
    written_bytes: int
    num_experts: int
    num_dense: int
    num_shards: int
    resumed: int
    repacked: int = 0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def quantise(source: Path, target: Path, options: QuantiseOptions, progress: Progress) -> QuantiseResult:
    """Write `source`, quantised, to `target`, or go on with a run of the same that was cut off. A GPTQ or AWQ
    checkpoint keeps its values and becomes one that is read.

    `progress("quantising", done_bytes, total_bytes)` counts bytes of the source. Raises UsageError (a group that does
    not divide, a quantised source, a target that is something else), UnsupportedModelError, OutputError and BudgetError
    (no memory); a second call goes on after anything but the first.
    """
    refuse_target(source, target)
    if is_gguf(source):
        raise UsageError(f"{source} is a GGUF file; start from the model as it was published in bfloat16")
    if None not in (options.dense, options.head) and options.dense != options.head:
        raise UsageError(
            f"dense is {options.dense} and head is {options.head}; transformers reads one format for all linear layers "
            "besides the experts: use the same for both"
        )
    scheme = find_scheme(read_config(source))
    if scheme is not None:
        return _repacked(source, target, scheme, options, progress)
    with explained(None), ExitStack() as opened:
        config, quantisation = read_model_config(source, trust_remote_code=options.trust_remote_code)
        if quantisation is not None:
            raise UsageError(
                f"{source} is quantised already ({quantisation.method}); start from the model as it was published "
                "in bfloat16"
            )
        index = CheckpointIndex.open(source)
        opened.callback(index.close)
        model = build_on_meta(config, index, trust_remote_code=options.trust_remote_code)
        mapping = KeyMapping(model)
        targets = mapping.targets(index.tensors)
        experts, expert_keys = map_experts(model, index, mapping, targets)
        plan = plan_quantization(
            model, index, mapping, targets, experts, expert_keys, kind=options.expert_format, dense=options.dense,
            head=options.head, group=options.group, shard_bytes=options.shard_bytes,
        )  # fmt: skip
        writer = CheckpointWriter(target, [shard.planned for shard in plan.shards], _identity(index, options))
        writer.begin()
        kernels, _ = load_cpu_kernels(threads=num_cores())
        if kernels is not None:
            opened.callback(kernels.close)
        resumed = _write_shards(writer, plan, index, kernels, progress)
        raw = read_json(source / CONFIG_NAME)
        writer.finish({**raw, "quantization_config": quantization_config(plan, options)}, small_files(source))
    return QuantiseResult(
        source_bytes=plan.source_bytes, written_bytes=plan.written_bytes, num_experts=plan.num_experts,
        num_dense=plan.num_dense, num_shards=len(plan.shards), resumed=resumed,
    )  # fmt: skip


def _repacked(
    source: Path, target: Path, scheme: Scheme, options: QuantiseOptions, progress: Progress
) -> QuantiseResult:
    if _BITS[options.expert_format] != scheme.bits:
        raise UsageError(
            f"{source} is {scheme.packing} of {scheme.bits} bits and keeps its values; "
            f"use --expert-format int{scheme.bits}"
        )
    with explained(None):
        found = repack_checkpoint(source, target, scheme, progress)
    return QuantiseResult(
        source_bytes=found.source_bytes, written_bytes=found.written_bytes, num_experts=0, num_dense=0,
        num_shards=found.num_shards, resumed=found.resumed, repacked=found.num_matrices,
    )  # fmt: skip


def quantization_config(plan: QuantisePlan, options: QuantiseOptions) -> dict[str, Any]:
    """The entry of config.json for compressed-tensors: weights only, one group of layers or two, and what stays."""
    other = options.dense or options.head or options.expert_format
    given = {r"re:.*\.experts\.\d+\..*": options.expert_format, "Linear": other}
    if other == options.expert_format:
        given = {"Linear": other}
    groups = {
        f"group_{idx}": {
            "targets": [target],
            "weights": {
                "num_bits": _BITS[kind], "type": "int", "symmetric": True, "strategy": "group",
                "group_size": options.group, "dynamic": False,
            },
            "input_activations": None, "output_activations": None, "format": "pack-quantized",
        }
        for idx, (target, kind) in enumerate(given.items())
    }  # fmt: skip
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": groups, "ignore": list(plan.ignored), "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }  # fmt: skip


def _identity(index: CheckpointIndex, options: QuantiseOptions) -> dict[str, Any]:
    """Properties that two runs must share for one to go on where the other stopped."""
    return {
        "source": source_identity(index), "experts": options.expert_format, "dense": options.dense,
        "head": options.head, "group": options.group, "encoder": 1,
    }  # fmt: skip


def _write_shards(
    writer: CheckpointWriter, plan: QuantisePlan, index: CheckpointIndex, kernels: CpuKernels | None, progress: Progress
) -> int:
    """Write what is not there yet; returns how many shards were."""
    finished = [idx for idx in range(len(plan.shards)) if writer.is_finished(idx)]
    sizes = [sum(item.num_bytes for item in shard.items) for shard in plan.shards]
    skipped = {idx: writer.num_written(idx) for idx in range(len(plan.shards)) if idx not in finished}
    total = sum(size for idx, size in enumerate(sizes) if idx not in finished)
    done = 0

    def count(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        progress("quantising", done, total)

    for idx, shard in enumerate(plan.shards):
        if idx not in finished:
            with closing(_shard_bytes(shard, index, kernels, count, skipped[idx])) as data:
                writer.write(idx, data, begin=skipped[idx])
    return len(finished)


# Pieces that are read and not encoded yet, and pieces encoded and not written: the drive syncs every 128 MiB, and what
# is encoded meanwhile waits here.
_READ_AHEAD, _ENCODED_AHEAD = 2, 32


def _shard_bytes(
    shard: ShardPlan, index: CheckpointIndex, kernels: CpuKernels | None, count: Callable[[int], None], skip: int
) -> Generator[memoryview | bytes, None, None]:
    """The bytes of a shard's tensors in the order of its plan, from byte `skip`. Items before that are not read."""
    shapes = b"".join(size.to_bytes(8, "little") for matrix in shard.matrices for size in matrix.shape)
    if skip < len(shapes):
        yield shapes[skip:]
    stages = Stages(
        written_bytes=_written_bytes, read=lambda items: _read(items, index),
        encode=lambda pieces: _encoded(pieces, kernels), depths=(_READ_AHEAD, _ENCODED_AHEAD),
    )  # fmt: skip
    yield from stages.run(shard.items, max(0, skip - len(shapes)), count)


def _written_bytes(item: PlannedMatrix | TensorEntry) -> int:
    return item.num_bytes if isinstance(item, TensorEntry) else sum(part.num_bytes for part in item.written)


# Rows of a matrix and whether they are its last, or a piece of a tensor that is copied.
_Source = tuple[PlannedMatrix, torch.Tensor, bool] | memoryview


def _read(items: Sequence[PlannedMatrix | TensorEntry], index: CheckpointIndex) -> Iterator[_Source]:
    for item in items:
        if isinstance(item, TensorEntry):
            yield from copied(item, index)
            continue
        num_rows, width = item.shape
        step = max(1, PIECE_BYTES // item.row_bytes)
        for begin in range(0, num_rows, step):
            values = torch.empty((min(step, num_rows - begin), width), dtype=TORCH_DTYPES[item.dtype])
            start = item.start + begin * item.row_bytes
            index.files[item.file_idx].read_into(writable_bytes(values), start, need_bytes=values.nbytes)
            yield item, values, begin + step >= num_rows


def _encoded(pieces: Iterator[_Source], kernels: CpuKernels | None) -> Iterator[tuple[memoryview, int]]:
    """Pieces of the result, each with the bytes of the source that it stands for: codes as they are made, then all
    scales of the matrix.
    """
    scales: list[torch.Tensor] = []
    for piece in pieces:
        if isinstance(piece, memoryview):
            yield piece, len(piece)
            continue
        matrix, values, is_last = piece
        made = encode_by_library(kernels, values, matrix.format, name=f"{matrix.name}.weight")
        assert made.scales is not None, f"{matrix.format=}"
        scales.append(made.scales)
        yield writable_bytes(made.codes), values.nbytes
        if is_last:
            yield writable_bytes(torch.cat(scales)), 0
            scales.clear()
