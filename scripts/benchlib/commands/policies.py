"""Bytes that every eviction policy, "auto" and Belady's bound read on one trace, at several cache sizes.

A trace is a file of `offmoe trace`, or is recorded here: `--generate N` lets the model write N tokens to mixed prompts,
`--given N` lets it read N of the ids beside a published-shape checkpoint, which are then replayed token by token.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchlib.command_line import make_parser
from benchlib.machine import describe_machine
from benchlib.traces import deeper, record_generated, record_given, token_calls
from offmoe.cache.auto import AutoPolicy, choose_policy
from offmoe.cache.policy import POLICY_NAMES, needs_quota
from offmoe.cache.replay import ReplayedCall, layer_calls, replay_belady
from offmoe.cache.shadow import ShadowCache
from offmoe.core.units import format_percent
from offmoe.trace.file import TraceHeader
from offmoe.trace.reader import read_trace


def replay(calls: Sequence[ReplayedCall], header: TraceHeader, num_slots: int, name: str) -> dict[str, Any]:
    """One policy at one size: bytes read for prompts and replies, and CPU microseconds of bookkeeping a layer call."""
    policy = choose_policy(name, num_slots, header.experts_per_layer, header.expert_bytes, header.top_k)
    shadow, read = ShadowCache(policy, num_slots, header.num_layers), [0, 0]
    auto = policy if isinstance(policy, AutoPolicy) else None
    begin = time.process_time()
    for call in calls:
        result = shadow.call(call.layer_idx, call.rows_by_expert, starts_pass=call.starts_pass)
        if auto is not None:
            auto.layer_call(call.layer_idx, [idx for idx, rows in call.rows_by_expert.items() for _ in range(rows)])
        read[call.is_prefill] += len(result.misses) * header.expert_bytes[call.layer_idx]
    seconds = time.process_time() - begin
    facts = {} if auto is None else {"chosen": auto.name, "switches": auto.race.num_switches}
    return {"decode_bytes": read[0], "prefill_bytes": read[1], "us_per_call": seconds / len(calls) * 1e6, **facts}


def run(calls: Sequence[ReplayedCall], header: TraceHeader, share: float) -> dict[str, Any]:
    """All policies at one size."""
    num_slots = round(share * header.num_experts)
    rows = {}
    for name in (*POLICY_NAMES, "auto"):
        rows[name] = replay(calls, header, num_slots, name)
        print(f"{share:.0%} {name}: {rows[name]}", file=sys.stderr)
    bound = replay_belady(calls, num_slots, header.expert_bytes)
    rows["belady"] = {"decode_bytes": bound.decode.missed_bytes, "prefill_bytes": bound.prefill.missed_bytes}
    quota = needs_quota(num_slots, header.num_layers, header.top_k)
    return {"share": share, "slots": num_slots, "quota": quota, "policies": rows}


def total(row: dict[str, Any]) -> int:
    """Bytes read for everything."""
    return int(row["decode_bytes"] + row["prefill_bytes"])


def render(args: argparse.Namespace, header: TraceHeader, num_tokens: int, results: list[dict[str, Any]]) -> str:
    """The result file."""
    machine = ", ".join(f"{key} {value}" for key, value in describe_machine().items())
    lines = [
        f"# Policies: bytes read by {header.model}, {datetime.datetime.now(tz=datetime.timezone.utc):%Y-%m-%d}",
        "",
        f"- command: `scripts/bench policies {shlex.join(Path(arg).name for arg in sys.argv[1:])}`",
        f"- machine: {machine}",
        f"- model: {header.num_layers} MoE layers, {header.num_experts} experts, top {header.top_k}",
        f"- work: {args.about}; {num_tokens} tokens one at a time; counted by replay, without prefetch",
        "- all figures but the last column are bytes, as shares of what LRU reads; a token's experts need "
        f"{header.num_layers * header.top_k} slots",
        "",
        "| slots | policy | read | to the best fixed | replies | prompts | bookkeeping |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        policies = result["policies"]
        lru, best = policies["lru"], min(total(policies[name]) for name in POLICY_NAMES)
        for name, row in policies.items():
            parts = [
                f"{result['slots']} ({format_percent(result['share'])})" + (", a share a layer" * result["quota"]),
                f"{name} ({row['chosen']}, {row['switches']} switches)" if "chosen" in row else name,
                f"{total(row) / total(lru):.3f}", f"{total(row) / best:.3f}",
                f"{row['decode_bytes'] / lru['decode_bytes']:.3f}",
                f"{row['prefill_bytes'] / lru['prefill_bytes']:.3f}" if lru["prefill_bytes"] else "-",
                f"{row['us_per_call']:.0f} us" if "us_per_call" in row else "-",
            ]  # fmt: skip
            lines.append(f"| {' | '.join(parts)} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str]) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("trace", type=Path, help="trace file, to read or to record")
    parser.add_argument("--model", type=Path, help="checkpoint folder to record a trace of")
    parser.add_argument("--generate", type=int, metavar="N", help="record N sampled tokens")
    parser.add_argument("--given", type=int, metavar="N", help="record N given tokens")
    parser.add_argument("--ram", default="4GiB", help="for recording")
    parser.add_argument("--split", action="store_true", help="replay prompts token by token (of --given)")
    parser.add_argument(
        "--times", type=int, default=1, metavar="N",
        help="all layers N times over: what bookkeeping costs in a deeper model (default: 1)",
    )  # fmt: skip
    parser.add_argument("--share", type=float, nargs="+", default=[0.1, 0.25, 0.5], help="of the experts, in slots")
    parser.add_argument("--out", type=Path, help="result file, Markdown")
    args = parser.parse_args(argv)
    if args.generate:
        record_generated(args.model, args.trace, num_tokens=args.generate, ram=args.ram, warm_start=False)
    elif args.given:
        record_given(args.model, args.trace, num_tokens=args.given, ram=args.ram, warm_start=False)
    trace = read_trace(args.trace)
    split = args.split or bool(args.given)
    args.about = "given text" if split else f"sampled replies to {len(trace.prompt_starts)} mixed prompts"
    if args.times > 1:
        args.about += f", its layers {args.times} times over"
    events = token_calls(trace.events, trace.header.num_layers) if split else trace.events
    header, events = deeper(trace.header, events, args.times)
    calls = layer_calls(events)
    num_tokens = sum(call.starts_pass and not call.is_prefill for call in calls)
    results = [run(calls, header, share) for share in args.share]
    text = render(args, header, num_tokens, results)
    print(text)
    if args.out:
        args.out.write_text(text)
    print(json.dumps(results))
