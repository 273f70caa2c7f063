"""Turn a Qwen3-MoE safetensors folder into one GGUF file, so that llama.cpp runs the very same weights.

    PYTHON scripts/benchlib/gguf_writer.py CHECKPOINT OUT.gguf --type f16

PYTHON is an interpreter with `gguf` (the one llama-cpp-python is installed in); nothing else of this project is
imported. One tensor of one layer is in memory at a time. Norms and routers are float32, as llama.cpp's own converter
writes them; every matrix has the asked type (llama.cpp's own q4_0 files keep the output matrix at 6 bits; here it is
q4_0 too, which is faster). There is no vocabulary in the file: benches feed ids.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

TYPES = {
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q4_0": (gguf.GGMLQuantizationType.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
}
EXPERT = re.compile(r"(model\.layers\.\d+\.mlp\.experts\.)\d+(\..*)")


class UnsupportedError(Exception):
    """The checkpoint is not one this converter knows."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Where one tensor lies: `offset` bytes into `path`."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: str

    def read(self) -> NDArray[np.float32]:
        """The tensor as float32."""
        count = int(np.prod(self.shape))
        stored = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}[self.dtype]
        raw = np.fromfile(self.path, dtype=stored, count=count, offset=self.offset)
        if self.dtype == "BF16":  # the upper half of a float32
            raw = (raw.astype(np.uint32) << 16).view(np.float32)
        return raw.astype(np.float32, copy=False).reshape(self.shape)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="folder with config.json and safetensors")
    parser.add_argument("out", type=Path, help="file to write")
    parser.add_argument("--type", default="f16", choices=sorted(TYPES), help="of the matrices (default: f16)")
    args = parser.parse_args(argv)
    partial = args.out.with_name(args.out.name + ".partial")
    try:
        convert(args.checkpoint, partial, type_name=args.type)
        partial.rename(args.out)
    except (UnsupportedError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        partial.unlink(missing_ok=True)
    return 0


def convert(checkpoint: Path, out: Path, *, type_name: str) -> None:
    """Write `out`. Raises `UnsupportedError` unless the checkpoint is a Qwen3-MoE with renormalised top-k weights."""
    config = json.loads((checkpoint / "config.json").read_text())
    if config.get("model_type") != "qwen3_moe" or not config.get("norm_topk_prob"):
        raise UnsupportedError(
            f"{checkpoint} is {config.get('model_type')!r}; only qwen3_moe with norm_topk_prob works"
        )
    tensors = gather(checkpoint, num_layers=config["num_hidden_layers"])
    writer = gguf.GGUFWriter(out, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.QWEN3MOE])
    write_settings(writer, config, name=checkpoint.name, file_type=TYPES[type_name][1])
    for name, parts in tensors.items():
        kind = tensor_type(name, parts, type_name)
        shape = tensor_shape(parts)
        num_bytes = int(np.prod(gguf.quants.quant_shape_to_byte_shape(shape, kind)))
        writer.add_tensor_info(name, shape, np.dtype(np.float32), num_bytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for idx, (name, parts) in enumerate(tensors.items()):
        kind = tensor_type(name, parts, type_name)
        writer.write_tensor_data(encode(parts, kind))
        if idx % 20 == 0:
            print(f"{out.stem}: tensor {idx + 1} of {len(tensors)}", file=sys.stderr, flush=True)
    writer.close()


def gather(checkpoint: Path, *, num_layers: int) -> dict[str, list[Stored]]:
    """Map each GGUF name to its parts: one stored tensor, or a layer's experts in order."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3MOE, num_layers)
    stored = dict(stored_tensors(checkpoint))
    tensors: dict[str, list[Stored]] = {}
    for source in sorted(stored, key=in_order):
        match = EXPERT.fullmatch(source)
        merged = match[1] + match[2].lstrip(".") if match else source
        target = names.get_name(merged, try_suffixes=(".weight",))
        if target is None:
            raise UnsupportedError(f"{checkpoint} holds {source}, which GGUF has no name for")
        tensors.setdefault(target, []).append(stored[source])
    return tensors


def in_order(name: str) -> list[int | str]:
    """Sort key that counts numbers in a name as numbers: expert 2 comes before expert 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def stored_tensors(checkpoint: Path) -> Iterator[tuple[str, Stored]]:
    """Every tensor of every shard, from the headers alone."""
    for path in sorted(checkpoint.glob("*.safetensors")):
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(header_bytes))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            offset = 8 + header_bytes + entry["data_offsets"][0]
            yield name, Stored(path=path, offset=offset, shape=tuple(entry["shape"]), dtype=entry["dtype"])


def tensor_shape(parts: list[Stored]) -> tuple[int, ...]:
    """The shape in the GGUF: experts are stacked in front."""
    return parts[0].shape if len(parts) == 1 else (len(parts), *parts[0].shape)


def tensor_type(name: str, parts: list[Stored], type_name: str) -> gguf.GGMLQuantizationType:
    """float32 for norms and routers, the asked type for every other matrix."""
    if len(parts[0].shape) == 1 or "ffn_gate_inp" in name:
        return gguf.GGMLQuantizationType.F32
    return TYPES[type_name][0]


def encode(parts: list[Stored], kind: gguf.GGMLQuantizationType) -> NDArray[Any]:
    """The parts in their GGUF type; quantised rows come as bytes."""
    encoded = [gguf.quants.quantize(part.read(), kind) for part in parts]
    return encoded[0] if len(encoded) == 1 else np.stack(encoded)


def write_settings(
    writer: gguf.GGUFWriter, config: dict[str, Any], *, name: str, file_type: gguf.LlamaFileType
) -> None:
    """The key-value header, from the model's config.json."""
    rope = config.get("rope_parameters") or config
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_expert_count(config.get("num_experts") or config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])


if __name__ == "__main__":
    sys.exit(main())
