"""Time one token's attention over cached rows by the CPU kernels, against torch's fused operation, in turn.

    scripts/bench attention --out benchmarks/DATE-cpu-attention.md

Each call reads another cache, as each layer has its own, so that keys and values come from memory. Torch has one
thread, as while a token is decoded, and all of them. Figures are medians; GB/s are of keys and values read once. A
table goes to stderr, one JSON object to stdout, last.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn import functional

from benchlib.command_line import make_parser
from benchlib.machine import describe_machine, describe_versions
from benchlib.report import without_folders
from offmoe.kernels.cpu.decode import AttentionShape, CpuAttention
from offmoe.kernels.cpu.kernels import CpuKernels
from offmoe.kernels.cpu.loader import load_cpu_kernels

ROOT = Path(__file__).parents[3]
MOST_BYTES = 256 << 20
# Torch's threads look for work for a while after a call.
IDLE_S = 0.005


@dataclass(frozen=True)
class Shape:
    """Of a published model's attention. `width` of keys, `value_width` of values, which latents are the begin of."""

    name: str
    heads: int
    groups: int
    width: int
    value_width: int

    @property
    def row_bytes(self) -> int:
        """Of keys and values of one token in bfloat16."""
        return 2 * self.groups * (self.width if self.is_latent else self.width + self.value_width)

    @property
    def is_latent(self) -> bool:
        """Values are the begin of the keys."""
        return self.width != self.value_width


SHAPES = (
    Shape("OLMoE", 16, 16, 128, 128), Shape("Qwen3-30B-A3B", 32, 4, 128, 128), Shape("Mixtral-8x7B", 32, 8, 128, 128),
    Shape("gpt-oss", 64, 8, 64, 64), Shape("DeepSeek-V2-Lite", 16, 1, 576, 512), Shape("DeepSeek-V3", 128, 1, 576, 512),
)  # fmt: skip
COLUMNS = ("shape", "heads", "shared by", "tokens", "kernels us", "GB/s", "GFLOP/s", "torch us", "all threads",
           "times as fast")  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """Command line entry; returns the exit code."""
    command = list(argv)
    parser = make_parser(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[500, 4000, 16000], help="of context")
    parser.add_argument("--level", default="auto", help="instruction set of the kernels (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="also write a result file")
    args = parser.parse_args(command)
    kernels, why_none = load_cpu_kernels(args.level)
    if kernels is None:
        print(f"error: {why_none}", file=sys.stderr)
        return 2
    found = [compare(kernels, shape, tokens, args.rounds) for shape in SHAPES for tokens in args.tokens]
    kernels.close()
    print("\n".join(table(found)), file=sys.stderr)
    if args.out is not None:
        args.out.write_text(report(found, command))
    print(json.dumps({"bench": "attention", "records": found}))
    return 0


@torch.inference_mode()
def compare(kernels: CpuKernels, shape: Shape, num_tokens: int, rounds: int) -> dict[str, Any]:
    """Medians of one shape at one length."""
    num_caches = max(2, min(16, MOST_BYTES // (shape.row_bytes * num_tokens)))
    keys = [torch.randn(1, shape.groups, num_tokens, shape.width).bfloat16() for _ in range(num_caches)]
    values = [
        key[..., : shape.value_width] if shape.is_latent
        else torch.randn(1, shape.groups, num_tokens, shape.value_width).bfloat16()
        for key in keys
    ]  # fmt: skip
    query, scale = torch.randn(1, shape.heads, 1, shape.width).bfloat16(), shape.width**-0.5
    attention = CpuAttention(
        kernels,
        AttentionShape(
            num_heads=shape.heads, num_groups=shape.groups, width=shape.width, value_width=shape.value_width,
            scale=scale, dtype=torch.bfloat16,
        ),
    )  # fmt: skip

    def ours(idx: int) -> torch.Tensor:
        return attention.attend(query, keys[idx][0], values[idx][0])

    def torchs(idx: int) -> torch.Tensor:
        if shape.is_latent:  # as attention/latent.py asks for it
            return functional.scaled_dot_product_attention(query.transpose(1, 2), keys[idx], keys[idx], scale=scale)
        return functional.scaled_dot_product_attention(query, keys[idx], values[idx], scale=scale, enable_gqa=True)

    threads, seconds = torch.get_num_threads(), ([], [], [])  # type: ignore[var-annotated]
    for _ in range(rounds):
        for kind, call, num_threads in ((0, ours, 1), (1, torchs, 1), (2, torchs, threads)):
            torch.set_num_threads(num_threads)
            seconds[kind].append(timed(call, num_caches))
    torch.set_num_threads(threads)
    mine, one, all_threads = (median(each) for each in seconds)
    operations = 2 * shape.heads * num_tokens * (shape.width + shape.value_width)
    return {
        "shape": shape.name, "heads": shape.heads, "shared_by": shape.heads // shape.groups, "tokens": num_tokens,
        "kernels_s": mine, "bytes_per_s": shape.row_bytes * num_tokens / mine, "flops_per_s": operations / mine,
        "torch_s": one, "torch_all_threads_s": all_threads, "ratio": one / mine,
    }  # fmt: skip


def timed(call: Callable[[int], torch.Tensor], num_caches: int) -> float:
    """Seconds a call, over all caches."""
    time.sleep(IDLE_S)
    begin = time.perf_counter()
    for idx in range(num_caches):
        call(idx)
    return (time.perf_counter() - begin) / num_caches


def table(found: Sequence[dict[str, Any]]) -> list[str]:
    """As Markdown."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for one in found:
        cells = [
            one["shape"], str(one["heads"]), str(one["shared_by"]), str(one["tokens"]), f"{one['kernels_s'] * 1e6:.0f}",
            f"{one['bytes_per_s'] / 1e9:.1f}", f"{one['flops_per_s'] / 1e9:.0f}", f"{one['torch_s'] * 1e6:.0f}",
            f"{one['torch_all_threads_s'] * 1e6:.0f}", f"{one['ratio']:.1f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def report(found: Sequence[dict[str, Any]], command: Sequence[str]) -> str:
    """The result file."""
    return "\n".join([
        "# One token's attention on the CPU",
        "",
        f"- command: `{shlex.join(['scripts/bench', 'attention', *without_folders(command)])}`",
        f"- machine: {', '.join(f'{key} {value}' for key, value in describe_machine().items())}",
        f"- versions: {', '.join(f'{name} {version}' for name, version in describe_versions(ROOT).items())}",
        "- bfloat16; a call reads keys and values that no cache holds. `torch us` is on one thread, as while a token",
        "  is decoded; `times as fast` is against that",
        "",
        *table(found),
        "",
    ])  # fmt: skip
