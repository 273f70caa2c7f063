"""Fetching ahead from disk, on and off, in turns within one process: the same text, token by token.

    scripts/bench prefetch --model checkpoints/qwen3-6l --share 0.25 --out benchmarks/DATE-prefetch-disk.md

One engine for each setting of --prefetch is open, each with slots for `--share` of the experts. All decode the same
ids, a block of tokens each, forwards and back (A B B A), so that whatever the machine does meanwhile falls on all of
them. A ratio is that of two blocks over the same tokens. scripts/make_checkpoint.py makes the model and its ids.json.
Progress goes to stderr; the last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import offmoe
from benchlib.command_line import make_parser
from benchlib.given_ids import GivenIds, compared, take_turns
from benchlib.machine import describe_machine, describe_model, describe_versions
from offmoe.core.units import format_bytes

ROOT = Path(__file__).resolve().parents[3]


def listed(facts: Mapping[str, object]) -> str:
    """On one line."""
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def run(args: argparse.Namespace, share: float) -> dict[str, Any]:
    """One cache size: speeds, ratios to the first setting, bytes and hits."""
    ids = json.loads((args.model / "ids.json").read_text())[: args.prefill + args.blocks * args.block + 1]
    with offmoe.load(args.model, expert_slots=64, prefetch="off") as probe:
        total, slot_bytes = probe.plan.num_experts, probe.plan.slot_bytes
    slots = round(share * total)
    with ExitStack() as opened:
        systems = []
        for prefetch in args.prefetch:
            engine = offmoe.load(args.model, expert_slots=slots, prefetch=prefetch)
            systems.append(GivenIds(prefetch, engine, ids, num_prompt=args.prefill))
            opened.callback(systems[-1].close)
        for number in take_turns(systems, num_blocks=args.blocks, block=args.block):
            print(f"{share:.0%}: block {number} of {args.blocks}", file=sys.stderr, end="\r")
        num_tokens = args.block * args.blocks
        rows = {}
        for system in systems:
            spent = system.counts()
            ratio, median_ratio = compared(system, systems[0])
            rows[system.name] = {
                "tok_per_s": round(num_tokens / sum(system.block_s), 3),
                "ratio": round(ratio, 4),
                "median_block_ratio": round(median_ratio, 4),
                "hit_rate": round(spent.hit_rate, 4),
                "disk_bytes_per_token": round(spent.disk_bytes / num_tokens),
                "stall_ms_per_token": round(spent.disk_stall_ns / 1e6 / num_tokens, 2),
                "ahead_used_bytes_per_token": round(spent.ahead_used_bytes / num_tokens),
                "ahead_wasted_bytes_per_token": round(spent.ahead_wasted_bytes / num_tokens),
            }
    return {"share": share, "slots": slots, "slot_bytes": slot_bytes, "systems": rows}


def render(args: argparse.Namespace, results: list[dict[str, Any]]) -> str:
    """The result file."""
    lines = [
        f"# Fetching ahead from disk: {args.model.name}, {datetime.datetime.now(tz=datetime.timezone.utc):%Y-%m-%d}",
        "",
        f"- command: `scripts/bench prefetch {shlex.join(Path(arg).name for arg in sys.argv[1:])}`",
        *(f"- {name}: {value}" for name, value in (
            ("machine", listed(describe_machine())), ("versions", listed(describe_versions(ROOT))),
            ("model", listed(describe_model(args.model))),
        )),
        f"- work: {args.prefill} ids read, then {args.blocks} blocks of {args.block} ids, given, in turns (A B B A)",
        "",
        "| slots | prefetch | tok/s | to off | by block | hits | disk/token | stall/token | ahead: used, wasted |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for result in results:
        for name, row in result["systems"].items():
            lines.append(
                f"| {result['slots']} ({result['share']:.0%}) | {name} | {row['tok_per_s']:.2f} | {row['ratio']:.3f} | "
                f"{row['median_block_ratio']:.3f} | {row['hit_rate']:.1%} | "
                f"{format_bytes(row['disk_bytes_per_token'])} | {row['stall_ms_per_token']:.1f} ms | "
                f"{format_bytes(row['ahead_used_bytes_per_token'])}, "
                f"{format_bytes(row['ahead_wasted_bytes_per_token'])} |"
            )
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str]) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder with an ids.json")
    parser.add_argument("--share", type=float, nargs="+", default=[0.1, 0.25, 0.5], help="of the experts, in slots")
    parser.add_argument(
        "--prefetch", nargs="+", default=["off", "auto", "1"], help="settings; the first is compared to"
    )
    parser.add_argument("--prefill", type=int, default=64)
    parser.add_argument("--block", type=int, default=8)
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--out", type=Path, help="result file, Markdown")
    args = parser.parse_args(argv)
    results = [run(args, share) for share in args.share]
    print(file=sys.stderr)
    text = render(args, results)
    print(text)
    if args.out:
        args.out.write_text(text)
    print(json.dumps(results))
