"""A GGUF file in parts, or with its tensors in another layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray


def split_gguf(whole: Path, first: Path, *, num_parts: int) -> None:
    """The file cut as llama.cpp's gguf-split does: metadata in the first part, tensors in all."""
    reader = gguf.GGUFReader(whole)
    count = len(reader.tensors)
    for part in range(num_parts):
        path = first.with_name(first.name.replace("00001-of", f"{part + 1:05}-of"))
        field = reader.fields["general.architecture"]
        writer = gguf.GGUFWriter(path, str(field.contents()))
        if part == 0:
            _copy_numbers(reader, writer)
        writer.add_uint16("split.no", part)
        writer.add_uint16("split.count", num_parts)
        writer.add_int32("split.tensors.count", count)
        for tensor in reader.tensors[part * count // num_parts : (part + 1) * count // num_parts]:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _copy_numbers(reader: gguf.GGUFReader, writer: gguf.GGUFWriter) -> None:
    for name, field in reader.fields.items():
        if not name.startswith(("GGUF.", "general.")):
            writer.add_key_value(name, field.contents(), field.types[0])


Change = Callable[[str, NDArray[Any]], dict[str, NDArray[Any]]]


def rewrite(source: Path, target: Path, change: Change, *, numbers: dict[str, int] | None = None) -> None:
    """The file with each tensor replaced by what `change` makes of its name and data (as stored, rows of bytes), and
    with other whole numbers under the architecture's name.
    """
    reader = gguf.GGUFReader(source)
    architecture = str(reader.fields["general.architecture"].contents())
    writer = gguf.GGUFWriter(target, architecture)
    for name, field in reader.fields.items():
        if not name.startswith(("GGUF.", "general.")) and name.removeprefix(f"{architecture}.") not in (numbers or {}):
            writer.add_key_value(name, field.contents(), field.types[0])
    for key, number in (numbers or {}).items():
        writer.add_uint32(f"{architecture}.{key}", number)
    for tensor in reader.tensors:
        for name, data in change(tensor.name, np.array(tensor.data)).items():
            writer.add_tensor(name, data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
