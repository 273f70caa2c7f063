"""A checkpoint folder as one table: tensor name -> file, type, shape, byte range. Reads headers only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

from offmoe.checkpoint.derived import StoredTensor
from offmoe.checkpoint.gguf.config import gguf_config, gguf_sampling
from offmoe.checkpoint.gguf.file import check_part, is_gguf, split_paths
from offmoe.checkpoint.gguf.header import GgufHeader, GgufTensor, read_gguf_header
from offmoe.checkpoint.gguf.rope import Frequencies, frequencies
from offmoe.checkpoint.gguf.tensors import gguf_tensors
from offmoe.checkpoint.header import read_header
from offmoe.checkpoint.json_file import read_json
from offmoe.checkpoint.quant_config import Quantisation
from offmoe.checkpoint.quantised import join_quantised
from offmoe.checkpoint.shard_file import ShardFile
from offmoe.checkpoint.tensor_entry import TensorEntry
from offmoe.checkpoint.tokenizer_size import folder_tokenizer_bytes, gguf_tokenizer_bytes
from offmoe.core.errors import CheckpointError, ModelNotFoundError, UnsupportedModelError

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
# Types whose publisher brings Python code, and the type of transformers' own that is the same model to the number.
ALIASES = {"kimi_k2": "deepseek_v3"}
QUANT_CONFIG_NAME = "hf_quant_config.json"  # of NVIDIA's ModelOpt
_COMPARED_BYTES = 1 << 20
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


class CheckpointIndex:
    """All tensors of a checkpoint, with their files held open. Close it when the last reader is done.

    `tensors` are logical ones: a quantised matrix is one entry under its plain name, whatever it is stored as. `stored`
    are the tensors of the files. `folder` is that of a GGUF file, where the checkpoint is one, `sampling` its advice,
    `frequencies` what it changes of the model's angles.
    """

    def __init__(
        self, folder: Path, files: list[ShardFile], stored: dict[str, TensorEntry],
        quantisation: Quantisation | None = None, *, gguf: Mapping[str, StoredTensor] | None = None,
    ) -> None:  # fmt: skip
        self.folder = folder
        self.files = files
        self.stored = stored
        self.is_gguf = gguf is not None
        self.sampling: dict[str, float | bool] = {}
        self.frequencies: Frequencies | None = None
        self.tokenizer_bytes = 0 if gguf is not None else folder_tokenizer_bytes(folder)
        self.tensors: dict[str, StoredTensor] = (
            dict(join_quantised(stored, quantisation, self.read_bytes)) if gguf is None else dict(gguf)
        )

    @classmethod
    def open(cls, folder: Path, quantisation: Quantisation | None = None) -> CheckpointIndex:
        """Index `folder`: `model.safetensors`, or the shards that `model.safetensors.index.json` names; or a GGUF file.

        The index file says which files to open, their headers which tensors are there: as in transformers, a name that
        the index puts elsewhere, leaves out or has too many changes nothing, and a whole file goes before shards.

        `quantisation` is what config.json says (`read_quantisation`). Raises ModelNotFoundError (no checkpoint there),
        UnsupportedModelError (pickle files only, which are never opened) and CheckpointError (damaged, missing or
        contradicting files).
        """
        if is_gguf(folder):
            return cls._open_gguf(folder)
        names = _shard_names(folder)
        files: list[ShardFile] = []
        tensors: dict[str, TensorEntry] = {}
        try:
            for file_idx, name in enumerate(names):
                file = ShardFile(folder / name)
                files.append(file)
                with file.explained():
                    entries = read_header(
                        cast(BinaryIO, file.raw), file_name=str(file.path), file_bytes=file.num_bytes, file_idx=file_idx
                    )
                _merge(tensors, entries, files)
            return cls(folder, files, tensors, quantisation)
        except BaseException:
            for file in files:
                file.close()
            raise

    @classmethod
    def _open_gguf(cls, path: Path) -> CheckpointIndex:
        files: list[ShardFile] = []
        try:
            header = _read_gguf(path, files)
            stored = {name: tensor.entry for name, tensor in header.tensors.items()}
            index = cls(path.parent, files, stored, gguf=gguf_tensors(header, gguf_config(header)))
            index.sampling, index.frequencies = gguf_sampling(header), frequencies(header)
            index.tokenizer_bytes = gguf_tokenizer_bytes(header.metadata)
            return index
        except BaseException:
            for file in files:
                file.close()
            raise

    def __repr__(self) -> str:
        return f"<CheckpointIndex {self.folder.name} [{len(self.files)} files, {len(self.stored)} tensors]>"

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.num_bytes for entry in self.stored.values())

    @property
    def formats(self) -> dict[str, int]:
        """Bytes by how they are stored: type names, and the formats of quantised matrices; the most first."""
        sizes = Counter[str]()
        for entry in self.tensors.values():
            sizes[entry.dtype] += entry.num_bytes
        return dict(sizes.most_common())

    def read_bytes(self, entry: TensorEntry) -> bytes:
        """A small tensor."""
        data = bytearray(entry.num_bytes)
        self.read_bytes_into(entry, memoryview(data))
        return bytes(data)

    def read_bytes_into(self, entry: TensorEntry, view: memoryview) -> None:
        """Fill `view` (of entry.num_bytes bytes) with the tensor, through the page cache."""
        assert len(view) == entry.num_bytes, f"{len(view)=} {entry.num_bytes=}"
        self.files[entry.file_idx].read_into(view, entry.start, need_bytes=entry.num_bytes)

    def close(self) -> None:
        """Close every file."""
        for file in self.files:
            file.close()


def read_config(model: Path) -> dict[str, Any]:
    """config.json of a folder, or what a GGUF file's metadata say in its place. Raises as `CheckpointIndex.open`."""
    return gguf_config(_header(model)) if is_gguf(model) else _read_folder_config(model)


def _read_folder_config(folder: Path) -> dict[str, Any]:
    """config.json under the name that transformers knows the model by, with the quantisation that a file beside it
    tells.
    """
    config = read_json(folder / "config.json")
    known_as = ALIASES.get(str(config.get("model_type")))
    if known_as is not None:
        config = {name: value for name, value in config.items() if name != "auto_map"} | {"model_type": known_as}
    beside = folder / QUANT_CONFIG_NAME
    if beside.is_file() and not isinstance(config.get("quantization_config"), dict):
        told = read_json(beside).get("quantization")
        algorithm = told.get("quant_algo") if isinstance(told, dict) else None
        config = config | {"quantization_config": {"quant_method": f"modelopt {algorithm or 'without a name'}"}}
    return config


def _header(path: Path) -> GgufHeader:
    files: list[ShardFile] = []
    try:
        return _read_gguf(path, files)
    finally:
        for file in files:
            file.close()


def _read_gguf(path: Path, files: list[ShardFile]) -> GgufHeader:
    """The header of a file, or of all parts of a split one; the files are opened and added to `files`."""
    metadata: dict[str, Any] = {}
    tensors: dict[str, GgufTensor] = {}
    factors: dict[str, tuple[float, ...]] = {}
    parts = split_paths(path)
    for file_idx, part in enumerate(parts):
        files.append(ShardFile(part))
        with files[-1].explained():
            header = read_gguf_header(files[-1], file_idx=file_idx)
        check_part(part, header.metadata, file_idx, len(parts))
        twice = tensors.keys() & header.tensors.keys()
        if twice:
            raise CheckpointError(
                f"tensor {min(twice)!r} is in two parts of {path}; they are of two models, or one was renamed"
            )
        metadata = header.metadata | metadata
        tensors |= header.tensors
        factors |= header.factors
    expected = metadata.get("split.tensors.count", len(tensors))
    if expected != len(tensors):
        raise CheckpointError(
            f"{path} says {expected} tensors in all its parts, there are {len(tensors)}; parts are missing, or were "
            "renamed"
        )
    return GgufHeader(metadata=metadata, tensors=tensors, factors=factors)


def _shard_names(folder: Path) -> list[str]:
    if not (folder / INDEX_NAME).exists():
        if (folder / SINGLE_NAME).is_file():
            return [SINGLE_NAME]
        raise _nothing_to_load(folder)
    weight_map = read_json(folder / INDEX_NAME).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX_NAME} has no weight_map; download it again")
    for tensor, name in weight_map.items():
        if not is_shard_name(name):
            raise CheckpointError(f"{folder / INDEX_NAME} puts {tensor!r} into {name!r}, which is no shard name")
    names = sorted(set(weight_map.values()))
    if SINGLE_NAME not in names and (folder / SINGLE_NAME).is_file():
        return [SINGLE_NAME]
    missing = [name for name in names if not (folder / name).is_file()]
    if len(missing) == len(names) and (
        others := sorted(path.name for path in folder.glob("*.safetensors") if path.is_file())
    ):
        return others  # an index of files that were renamed, or cut anew, since: their headers say what is in them
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of {len(names)} shards, first {missing[0]}; download the rest"
        )
    return names


def is_shard_name(name: Any) -> bool:
    """A plain file name that every file system takes: the index may come from anywhere."""
    return (
        isinstance(name, str)
        and Path(name).name == name
        and name.endswith(".safetensors")
        and name.isprintable()
        and len(name.encode()) <= 255
    )


def _nothing_to_load(folder: Path) -> Exception:
    if not folder.is_dir():
        return ModelNotFoundError(f"{folder} is no folder; point at a Hugging Face model folder")
    loose = sorted(path.name for path in folder.glob("*.safetensors"))
    if loose:
        return CheckpointError(
            f"{folder} has {len(loose)} safetensors files (first {loose[0]}) but neither {SINGLE_NAME} nor "
            f"{INDEX_NAME}; download the index"
        )
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLE_SUFFIXES)
    if pickles:
        return UnsupportedModelError(
            f"{folder} holds only pickle files (first {pickles[0]}), which can run code when opened and are refused; "
            "get the safetensors version"
        )
    return ModelNotFoundError(
        f"{folder} has no {SINGLE_NAME} and no {INDEX_NAME}; point at a Hugging Face model folder"
    )


def _merge(tensors: dict[str, TensorEntry], entries: dict[str, TensorEntry], files: list[ShardFile]) -> None:
    """Add one shard's `entries`. The same tensor in two shards is one tensor; two of one name are damage."""
    for name in sorted(tensors.keys() & entries.keys()):
        if not _are_equal(tensors[name], entries[name], files):
            first, second = files[tensors[name].file_idx].name, files[entries[name].file_idx].name
            raise CheckpointError(
                f"tensor {name!r} is in both {first} and {second}, with other values; download the checkpoint again"
            )
    tensors.update({name: entry for name, entry in entries.items() if name not in tensors})


def _are_equal(first: TensorEntry, second: TensorEntry, files: list[ShardFile]) -> bool:
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    for begin in range(0, first.num_bytes, _COMPARED_BYTES):
        size = min(_COMPARED_BYTES, first.num_bytes - begin)
        parts = bytearray(size), bytearray(size)
        for entry, part in zip((first, second), parts, strict=True):
            files[entry.file_idx].read_into(memoryview(part), entry.start + begin, need_bytes=size)
        if parts[0] != parts[1]:
            return False
    return True
