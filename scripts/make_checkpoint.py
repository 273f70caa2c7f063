"""Make a random-weight checkpoint with the shapes and the on-disk layout of a published MoE model.

    python scripts/make_checkpoint.py --like qwen3-30b-a3b --layers 6 --out checkpoints/qwen3-6l

For benches: speed depends on shapes, layout and routing locality, not on what the weights have learned. The folder
holds sharded safetensors under the published tensor names, config.json, generation_config.json, a byte-level BPE
tokenizer trained on the standard library's text, and ids.json (held-out text as token ids, which benches feed).
gpt-oss is published as MXFP4; its experts are written here in the bfloat16 stacked form of transformers.
Memory stays under 2 GB however large the checkpoint; the same seed gives the same weights.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchlib.errors import ScriptError
from benchlib.families import FAMILIES, TensorSpec, build_config, tensor_specs
from benchlib.shapes import SHAPES, shape_config, shape_specs
from benchlib.shards import DTYPES, write_checkpoint
from benchlib.sizes import format_gb, parse_bytes
from benchlib.stdlib_text import held_out_ids, save_tokenizer, train_tokenizer

SOURCE_BYTES = 12_000_000  # enough for 32,000 merges, and trained in seconds
TINY_SOURCE_BYTES = 200_000
TINY_VOCAB = 512


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit code."""
    args = parse_args(argv)
    try:
        make_checkpoint(args)
    except (ScriptError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--like", required=True, choices=sorted([*FAMILIES, *SHAPES]), help="model whose shapes to take"
    )
    parser.add_argument("--layers", required=True, type=int, help="number of layers")
    parser.add_argument("--out", required=True, type=Path, help="folder to write; must be empty or absent")
    parser.add_argument("--dtype", default="bfloat16", choices=sorted(DTYPES), help="(default: bfloat16)")
    parser.add_argument("--vocab", type=int, default=None, help="vocabulary entries (default: 32000)")
    parser.add_argument("--expert-width", type=int, default=None, help="of qwen3-30b-a3b (default: as published)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("--max-shard-size", default="2GB", help="such as 500MB or 2GB (default: 2GB)")
    parser.add_argument("--tiny", action="store_true", help="small widths and few experts, for tests")
    return parser.parse_args(argv)


def make_checkpoint(args: argparse.Namespace) -> None:
    """Write the whole folder. Raises `ScriptError` for bad options, a folder in use or a full disk."""
    if args.layers < 1:
        raise ScriptError(f"--layers must be at least 1, not {args.layers}")
    vocab_size = args.vocab or (TINY_VOCAB if args.tiny else 32_000)
    if vocab_size < 257:
        raise ScriptError(f"--vocab must be at least 257 (256 bytes and the end of text), not {vocab_size}")
    is_shape = args.like in SHAPES
    if is_shape and args.tiny:
        raise ScriptError(f"--tiny is not for {args.like}; for: {', '.join(sorted(FAMILIES))}")
    overrides = FAMILIES[args.like].tiny if args.tiny else {}
    if args.expert_width is not None:
        if args.like != "qwen3-30b-a3b" or args.expert_width < 1:
            raise ScriptError(f"--expert-width {args.expert_width} is for qwen3-30b-a3b, and positive")
        overrides = {**overrides, "moe_intermediate_size": args.expert_width}
    max_shard_bytes = parse_bytes(args.max_shard_size)
    started_s = time.perf_counter()
    sizes: dict[str, Any] = {"num_layers": args.layers, "vocab_size": vocab_size, "dtype": args.dtype}
    if is_shape:
        config = shape_config(args.like, **sizes)
        specs = list(shape_specs(config))
    else:
        config = build_config(args.like, **sizes, overrides=overrides or None)
        specs = list(tensor_specs(args.like, config))
    prepare_folder(args.out, specs, item_bytes=DTYPES[args.dtype][0].itemsize)
    write_texts(args.out, config, source_bytes=TINY_SOURCE_BYTES if args.tiny else SOURCE_BYTES)
    total_bytes = write_checkpoint(
        args.out,
        specs,
        dtype=args.dtype,
        seed=args.seed,
        max_shard_bytes=max_shard_bytes,
        on_shard=lambda name, num_bytes: progress(f"{name}  {format_gb(num_bytes)}"),
    )
    elapsed_s = time.perf_counter() - started_s
    progress(f"{args.out}: {len(specs)} tensors, {format_gb(total_bytes)}, {elapsed_s:.0f} s")


def prepare_folder(out_dir: Path, specs: Sequence[TensorSpec], *, item_bytes: int) -> None:
    """Create the folder; refuse one in use, or a disk without room for the weights."""
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ScriptError(f"{out_dir} exists and is not an empty folder; remove it or name another with --out")
    out_dir.mkdir(parents=True, exist_ok=True)
    need_bytes = sum(spec.num_elements for spec in specs) * item_bytes
    free_bytes = shutil.disk_usage(out_dir).free
    if need_bytes > free_bytes:
        raise ScriptError(
            f"the checkpoint needs {format_gb(need_bytes)}, the disk has {format_gb(free_bytes)} free; lower --layers"
        )


def write_texts(out_dir: Path, config: dict[str, object], *, source_bytes: int) -> None:
    """Write everything but the weights: configuration, tokenizer and ids."""
    vocab_size = config["vocab_size"]
    assert isinstance(vocab_size, int), f"{vocab_size=}"
    progress(f"training a tokenizer of {vocab_size} entries")
    tokenizer = train_tokenizer(vocab_size, max_source_bytes=source_bytes)
    save_tokenizer(tokenizer, out_dir)
    ids = held_out_ids(tokenizer)
    (out_dir / "ids.json").write_text(json.dumps(ids) + "\n")
    (out_dir / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    generation = {"bos_token_id": 0, "eos_token_id": 0, "do_sample": False}
    (out_dir / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    progress(f"ids.json: {len(ids)} held-out ids, {tokenizer.get_vocab_size()} tokenizer entries")


def progress(line: str) -> None:
    """One line on stderr; stdout is for results."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
