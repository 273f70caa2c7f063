"""Hold the speeds that `offmoe tune` predicts against runs: one model, one text, several cache sizes and policies.

    scripts/bench tune --model checkpoints/qwen3-6l --out benchmarks/DATE-tune.md

One engine with slots for `--share` of the experts records a trace and what a token costs, as `offmoe tune` does. The
curves made of that are compared with engines of other sizes that write the same text, without prefetching. Progress
goes to stderr; the last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import offmoe
from benchlib.command_line import make_parser
from benchlib.machine import describe_machine, describe_versions
from benchlib.report import without_folders
from offmoe.engine.trace_run import record_prompts
from offmoe.planner.tuning import Curves, TokenCosts, make_curves, token_costs
from offmoe.trace.reader import read_trace

ROOT = Path(__file__).resolve().parents[3]


def main(argv: Sequence[str]) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder with an ids.json")
    parser.add_argument("--share", type=float, default=0.25, help="of the experts, where costs are measured (0.25)")
    parser.add_argument("--check", type=float, nargs="+", default=[0.125, 0.25, 0.5], help="of the experts, to run")
    parser.add_argument("--prompts", type=int, default=2, help="(default: 2)")
    parser.add_argument("--prefill", type=int, default=16, help="ids of a prompt (default: 16)")
    parser.add_argument("--decode", type=int, default=64, help="tokens after it (default: 64)")
    parser.add_argument("--out", type=Path, help="result file, Markdown")
    args = parser.parse_args(argv)
    ids = json.loads((args.model / "ids.json").read_text())
    prompts = [ids[number * 512 : number * 512 + args.prefill] for number in range(args.prompts)]
    curves, costs = tuned(args, prompts)
    rows = []
    for share in args.check:
        size = min(curves.sizes, key=lambda size: abs(size - share * curves.num_experts))
        for policy in dict.fromkeys(("lru", curves.adopted)):
            point = curves.at(policy, size)
            hit_rate, speed = measured(args, prompts, size, policy)
            rows.append({
                "slots": size, "policy": policy, "hit_rate": point.hit_rate, "measured_hit_rate": hit_rate,
                "tok_per_s": point.tok_per_s, "measured_tok_per_s": speed,
            })  # fmt: skip
            print(rows[-1], file=sys.stderr)
    text = render(args, curves, costs, rows)
    print(text)
    if args.out:
        args.out.write_text(text)
    print(json.dumps(rows))


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    """The same text in every run."""
    return {"seed": 0, "temperature": 1.0}


def tuned(args: argparse.Namespace, prompts: list[list[int]]) -> tuple[Curves, TokenCosts]:
    """As `offmoe tune` does."""
    with offmoe.load(args.model, expert_slots=1_000_000, prefetch="off", warm_start=False) as probe:
        slots = round(args.share * probe.plan.num_experts)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace"
        with offmoe.load(args.model, expert_slots=slots, prefetch="off", warm_start=False) as engine:
            samples = record_prompts(
                engine, prompts, path, max_new_tokens=args.decode, guesses=False, about={}, sampling=sampling(args)
            )
            slot_bytes = engine.plan.slot_bytes
        costs = token_costs(samples)
        assert costs is not None, "nothing was fetched"
        return make_curves(read_trace(path), costs=costs, slot_bytes=slot_bytes), costs


def measured(args: argparse.Namespace, prompts: list[list[int]], slots: int, policy: Any) -> tuple[float, float]:
    """Hit rate and tokens a second of decoding the same text."""
    with offmoe.load(args.model, expert_slots=slots, policy=policy, prefetch="off", warm_start=False) as engine:
        seconds, hits, lookups = list[float](), 0, 0
        for number, prompt in enumerate(prompts):
            settings = {**sampling(args), "seed": number}
            stats = engine.generate(
                prompt, max_new_tokens=args.decode, ignore_eos=True, reuse=False, **settings
            ).stats  # fmt: skip
            seconds += stats.step_s
            hits, lookups = hits + stats.decode.hits, lookups + stats.decode.lookups
        return hits / lookups, len(seconds) / sum(seconds)


def render(args: argparse.Namespace, curves: Curves, costs: TokenCosts, rows: list[dict[str, Any]]) -> str:
    """The result file."""
    lines = [
        f"# tune's predictions against runs: {args.model.name}, {datetime.date.today().isoformat()}", "",
        f"- command: `{shlex.join(['scripts/bench', 'tune', *without_folders(sys.argv[1:])])}`",
        f"- machine: {', '.join(f'{key} {value}' for key, value in describe_machine().items())}",
        f"- versions: {', '.join(f'{key} {value}' for key, value in describe_versions(ROOT).items())}",
        f"- work: {args.prompts} prompts of {args.prefill} ids, {args.decode} sampled tokens each; without prefetching",
        f"- costs, measured at {args.share:.0%}: {costs.fixed_s * 1e3:.1f} ms a token with all experts in memory, "
        f"{costs.fetch_bytes_per_s / 1e9:.2f} GB/s of missing experts, {costs.waiting_call_s * 1e3:.2f} ms a layer "
        f"call that fetches; adopted: {curves.adopted}",
        "", "| slots | policy | hits predicted | measured | tok/s predicted | measured | ratio |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        lines.append(
            f"| {row['slots']} ({row['slots'] / curves.num_experts:.0%}) | {row['policy']} | {row['hit_rate']:.1%} | "
            f"{row['measured_hit_rate']:.1%} | {row['tok_per_s']:.2f} | {row['measured_tok_per_s']:.2f} | "
            f"{row['tok_per_s'] / row['measured_tok_per_s']:.2f} |"
        )
    return "\n".join(lines) + "\n"
