"""Wall-clock benchmark of prefetching and of placing misses on a simulated device: RAM behind a link of a set speed.

    scripts/bench simulated                                  # a few minutes on two cores
    scripts/bench simulated --ratios 0.5 --share 0.1 --blocks 20 --out /tmp/result.md

The model is made on the spot (random weights, experts of about 600 KB, real text ids). `ratio` is the link's bandwidth
over that at which the same machine computes experts: at 0.2, copying an expert takes five times as long as using it.
All settings are open at once and decode the same text, a block of tokens each, forwards and back (A B B A); a ratio of
speeds is over all blocks, and by the median block. The first comparisons of prefetching and of placing are made
during the warm-up. Figures tell what the scheduling hides, not how fast a GPU is: two threads share the cores.
Progress goes to stderr; the last line on stdout is one JSON object. Exit code 1: ids differed where they must not.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from benchlib.command_line import make_parser
from benchlib.device_checkpoint import MadeModel, make_model
from benchlib.device_exact import demo_folder
from benchlib.device_systems import OffmoeSystem, Place
from benchlib.given_ids import GivenIds, Toggled, compared, take_turns
from benchlib.simulated_report import Result, as_json, render
from benchlib.stdlib_text import held_out_ids

ROOT = Path(__file__).resolve().parents[3]
VOCAB = 4096
SIZES = {
    "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "num_experts": 32,
    "num_experts_per_tok": 4, "moe_intermediate_size": 192, "intermediate_size": 512, "max_position_embeddings": 4096,
}  # fmt: skip
# Prefetching where every miss takes the link, the scheduler with nothing fetched ahead, and both.
SETTINGS: dict[str, dict[str, Any]] = {
    "stream, prefetch auto": {"miss": "stream", "prefetch": "auto"},
    "stream, prefetch off": {"miss": "stream", "prefetch": "off"},
    "cpu": {"miss": "cpu", "prefetch": "off"},
    "miss auto": {"miss": "auto", "prefetch": "off"},
    "all auto": {"miss": "auto", "prefetch": "auto"},
}
PAIRS = (
    ("stream, prefetch auto", "stream, prefetch off"),
    ("miss auto", "stream, prefetch off"),
    ("miss auto", "cpu"),
    ("all auto", "miss auto"),
)


@dataclass(frozen=True, kw_only=True)
class Work:
    """How much is run."""

    layers: int
    blocks: int
    block: int
    warmup: int
    settings: tuple[str, ...]
    prompt: int = 256

    @property
    def num_ids(self) -> int:
        """Of one setting."""
        return self.prompt + self.warmup + self.blocks * self.block


def main(argv: Sequence[str]) -> int:
    """Command line entry; returns the exit code."""
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    names = tuple(name for name in SETTINGS if name in args.settings)
    work = Work(layers=args.layers, blocks=args.blocks, block=args.block, warmup=args.warmup, settings=names)
    ids = [token_id % VOCAB for token_id in held_out_ids(Tokenizer.from_file(str(demo_folder() / "tokenizer.json")))]
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        model = make_model(
            Path(scratch) / "model", "qwen3-30b-a3b", num_layers=work.layers, vocab_size=VOCAB, dtype="float32",
            overrides=SIZES,
        )  # fmt: skip
        compute_s = resident_token_s(model, ids, work)
        routed_bytes = model.expert_bytes * model.num_layers * model.top_k
        progress(f"all experts resident: {compute_s * 1e3:.1f} ms a token, which uses {routed_bytes / 1e6:.1f} MB")
        results = [
            (run_toggled if args.toggle else run_one)(
                model, ids, work, ratio=ratio, share=share, link_bytes_per_s=ratio * routed_bytes / compute_s
            )
            for ratio in args.ratios
            for share in args.share
        ]
    same = all(result.same_ids for result in results)
    lines = render(args, model, compute_s, results, same=same)
    out = args.out or ROOT / "benchmarks" / f"{datetime.date.today().isoformat()}-simulated-link.md"
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines), file=sys.stderr)
    print(json.dumps({"bench": "simulated", "compute_s": compute_s, "same_ids": same,
                      "results": [as_json(result, compute_s) for result in results]}))  # fmt: skip
    return 0 if same else 1


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "--ratios", type=float, nargs="+", default=[0.5, 1.0], help="link over compute bandwidth (default: 0.5 1)"
    )
    parser.add_argument(
        "--share", type=float, nargs="+", default=[0.1, 0.25, 0.5],
        help="of the experts, in device slots (default: 0.1 0.25 0.5)",
    )  # fmt: skip
    parser.add_argument(
        "--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS), help="(default: all of them)"
    )
    parser.add_argument(
        "--toggle", action="store_true",
        help="instead of two engines, one whose prefetching is taken out in every other block",
    )  # fmt: skip
    parser.add_argument("--layers", type=int, default=8, help="(default: 8)")
    parser.add_argument("--blocks", type=int, default=40, help="of each setting (default: 40)")
    parser.add_argument("--block", type=int, default=8, help="tokens of a block (default: 8)")
    parser.add_argument("--warmup", type=int, default=320, help="tokens before the first block (default: 320)")
    parser.add_argument("--threads", type=int, default=1, help="torch's; the link has one of its own (default: 1)")
    parser.add_argument("--out", type=Path, help="result file (default: benchmarks/DATE-simulated-link.md)")
    return parser.parse_args(argv)


def open_system(
    name: str, model: MadeModel, *, slots: int, link_bytes_per_s: float, context_length: int = 1024, **options: Any
) -> OffmoeSystem:  # fmt: skip
    """An engine on a simulated device of its own."""
    return OffmoeSystem(
        name, model, Place(simulated_bytes_per_s=link_bytes_per_s), expert_slots=slots, compile="off",
        context_length=context_length, ram=4 * model.all_experts_bytes + (2 << 30), **options,
    )  # fmt: skip


def resident_token_s(model: MadeModel, ids: Sequence[int], work: Work) -> float:
    """Seconds of a token when all experts are in slots and nothing moves."""
    system = open_system(
        "resident", model, slots=model.routed_experts, link_bytes_per_s=1e12, miss="stream", prefetch="off"
    )
    try:
        for _ in range(2):
            run = system.run(ids[: work.prompt + 48], num_prompt=work.prompt)
    finally:
        system.close()
    return run.token_s


def run_one(
    model: MadeModel, ids: Sequence[int], work: Work, *, ratio: float, share: float, link_bytes_per_s: float
) -> Result:  # fmt: skip
    """All settings at one link speed and one number of slots."""
    slots = max(model.top_k, round(share * model.routed_experts))
    systems: dict[str, GivenIds] = {}
    with ExitStack() as opened:
        for name in work.settings:
            engine = open_system(
                name, model, slots=slots, link_bytes_per_s=link_bytes_per_s, context_length=work.num_ids + 1,
                **SETTINGS[name],
            ).engine  # fmt: skip
            # A prompt that brings every expert to RAM, then tokens on which scheduler and prefetcher settle.
            systems[name] = GivenIds(name, engine, ids[: work.num_ids], num_prompt=work.prompt)
            opened.callback(systems[name].close)
            progress(f"ratio {ratio:g}, {share:.0%}: warming up {name}")
            systems[name].run_block(work.warmup)
            systems[name].restart()
        for number in take_turns(list(systems.values()), num_blocks=work.blocks, block=work.block):
            if number % 10 == 0:
                progress(f"ratio {ratio:g}, {share:.0%}: block {number} of {work.blocks}")
        return Result(
            ratio=ratio, share=share, link_bytes_per_s=link_bytes_per_s,
            settings={name: figures(system) for name, system in systems.items()},
            pairs={
                (a, b): compared(systems[a], systems[b]) for a, b in PAIRS if a in systems and b in systems
            },
            same_ids=same_ids(systems),
        )  # fmt: skip


def run_toggled(
    model: MadeModel, ids: Sequence[int], work: Work, *, ratio: float, share: float, link_bytes_per_s: float
) -> Result:  # fmt: skip
    """Those of the settings that fetch ahead, each against itself without."""
    slots = max(model.top_k, round(share * model.routed_experts))
    found, rows = {}, {}
    for name in (name for name in work.settings if SETTINGS[name]["prefetch"] == "auto"):
        engine = open_system(
            name, model, slots=slots, link_bytes_per_s=link_bytes_per_s, context_length=work.num_ids + 1,
            **SETTINGS[name],
        ).engine  # fmt: skip
        system = GivenIds(name, engine, ids[: work.num_ids], num_prompt=work.prompt)
        try:
            progress(f"ratio {ratio:g}, {share:.0%}: warming up {name}")
            system.run_block(work.warmup)
            system.restart()
            toggled = Toggled(system, model.expert_bytes)
            for number in range(work.blocks):
                toggled.run(work.block, on=number % 4 in (0, 3))
            found[name], rows[name] = toggled.ratio(), figures(system)
            progress(f"ratio {ratio:g}, {share:.0%}: {name}, on over off {found[name][0]:.3f}")
        finally:
            system.close()
    return Result(
        ratio=ratio, share=share, link_bytes_per_s=link_bytes_per_s, settings=rows, pairs={}, same_ids=True,
        toggled=found,
    )  # fmt: skip


def figures(system: GivenIds) -> dict[str, float]:
    """Tokens a second, median over tokens, and every counter's mean over tokens."""
    counts = system.counts().as_dict()
    return {
        "tok_per_s": 1 / statistics.median(system.token_s),
        **{name: count / len(system.token_s) for name, count in counts.items()},
    }


def same_ids(systems: dict[str, GivenIds]) -> bool:
    """Prefetching moves bytes earlier and computes the same: ids must be equal."""
    both = [systems[name].next_ids for name in PAIRS[0] if name in systems]
    return all(ids == both[0] for ids in both)


def progress(line: str) -> None:
    """One line on stderr; stdout is for the result."""
    print(line, file=sys.stderr, flush=True)
