"""Time offmoe on a GPU at several VRAM sizes, on models of published shapes made on the spot, beside its peers.

    scripts/bench device                                     # both shapes, about five minutes
    scripts/bench device --models mixtral-8x7b --shares 10,25 --seconds 200
    scripts/bench device --simulate --seconds 60             # no GPU: tries the script, measures nothing

Weights are random, ids are those of real text, so the routing is that of random routers; shapes and bytes are true.
Everything measured so far is in --partial after every measurement. Progress goes to stderr; the last line on stdout is
one JSON object. Exit code 0: all ran, ids were equal where they must be, and no peak was above its budget.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers.utils import logging as transformers_logging

from benchlib.bandwidths import TINY, Sizes, measure
from benchlib.command_line import make_parser
from benchlib.device_checkpoint import MadeModel, make_model
from benchlib.device_exact import check_exact, copy_as_float32, demo_folder
from benchlib.device_levels import SETTINGS, Bench, Level, Work, run_level
from benchlib.device_report import device_tables
from benchlib.device_systems import Place, offloaded_transformers, release_device, resident_transformers
from benchlib.errors import ScriptError
from benchlib.families import FAMILIES
from benchlib.ledger import Ledger, TimeIsUpError
from benchlib.roofline import Bandwidths
from benchlib.stdlib_text import held_out_ids

LAYERS = {"qwen3-30b-a3b": 12, "mixtral-8x7b": 4}
VOCAB = 32_000
RAM_DISK = Path("/dev/shm")
SIMULATED_BYTES_PER_S = 2e9
TINY_WORK = Work(prompts=(16, 48), decode_prompt=8, decode_block=8, warmup=4, rounds=1)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to run, from the command line."""

    models: tuple[str, ...]
    shares: tuple[float, ...]
    layers: int | None
    simulate: bool
    scratch: Path
    place: Place
    work: Work
    settings: tuple[str, ...] = ()
    exact: bool = True
    keeps: bool = False

    def num_layers(self, name: str) -> int:
        """Layers of a model."""
        return self.layers or (2 if self.simulate else LAYERS[name])


def main(argv: Sequence[str]) -> int:
    """Command line entry; returns the exit code."""
    args = parse_args(argv)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    ledger = Ledger(args.partial, limit_s=args.seconds)
    try:
        with tempfile.TemporaryDirectory(prefix="bench-", dir=args.scratch or default_scratch()) as scratch:
            bench_all(ledger, read_plan(args, Path(scratch)))
    except ScriptError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for line in device_tables(ledger.records):
        print(line, file=sys.stderr)
    print(json.dumps({"bench": "device", "simulated": args.simulate, "records": ledger.records}))
    return 1 if ledger.failures else 0


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--models", default=",".join(LAYERS), help="(default: %(default)s)")
    parser.add_argument("--layers", type=int, help="of every model (default: qwen3 12, mixtral 4)")
    parser.add_argument("--shares", default="25,100,10,50", help="percent of experts in VRAM, in order of importance")
    parser.add_argument(
        "--seconds", type=float, default=330, help="what is not begun by then is left out (default: 330)"
    )
    parser.add_argument("--partial", type=Path, help="JSON file rewritten after every measurement")
    parser.add_argument(
        "--scratch", type=Path, help="for checkpoints, 15 GB (default: RAM disk, else temporary folder)"
    )
    parser.add_argument("--settings", default="", help=f"these alone, without peers; known: {', '.join(SETTINGS)}")
    parser.add_argument("--exact", action="store_true", help="with --settings: compare ids with the CPU's too")
    parser.add_argument("--keep", type=Path, help="a folder in which checkpoints stay, for a later call")
    parser.add_argument("--simulate", action="store_true", help="tiny models on a simulated device")
    return parser.parse_args(argv)


def read_plan(args: argparse.Namespace, scratch: Path) -> Plan:
    """Check what was asked for. Raises `ScriptError`."""
    models = tuple(name for name in args.models.split(",") if name)
    for name in models:
        if name not in LAYERS:
            raise ScriptError(f"unknown model {name!r}; known: {', '.join(LAYERS)}")
    try:
        shares = tuple(float(share) / 100 for share in args.shares.split(","))
    except ValueError:
        raise ScriptError(f"--shares is {args.shares!r}; write percents such as 10,25,50,100") from None
    if not args.simulate and not torch.cuda.is_available():
        raise ScriptError("no CUDA device is available to this torch; --simulate tries the script without one")
    settings = tuple(name.strip() for name in args.settings.split(",") if name.strip())
    if unknown := [name for name in settings if name not in SETTINGS]:
        raise ScriptError(f"unknown setting {unknown[0]!r}; known: {', '.join(SETTINGS)}")
    place = Place(simulated_bytes_per_s=SIMULATED_BYTES_PER_S if args.simulate else None)
    return Plan(
        models=models, shares=shares, layers=args.layers, simulate=args.simulate, scratch=args.keep or scratch,
        place=place, work=TINY_WORK if args.simulate else Work(), settings=settings,
        exact=args.exact or not settings, keeps=args.keep is not None,
    )  # fmt: skip


def default_scratch() -> Path | None:
    """The RAM disk, where it has room for a model."""
    if RAM_DISK.is_dir() and shutil.disk_usage(RAM_DISK).free > (20 << 30):
        return RAM_DISK
    return None


def bench_all(ledger: Ledger, plan: Plan) -> None:
    """Everything, the most telling first."""
    tokenizer = Tokenizer.from_file(str(demo_folder() / "tokenizer.json"))
    ids = held_out_ids(tokenizer)
    speeds = measure(plan.place.torch_device, TINY if plan.simulate else Sizes())
    ledger.add("bandwidths", **speeds.as_dict())
    release_device()
    if plan.exact:
        check_demo(ledger, plan, ids)
    for idx, name in enumerate(plan.models):
        # The first of two gets three fifths of the time that is left.
        until_s = ledger.left_s * (1 if idx == len(plan.models) - 1 else 0.4)
        bench_model(ledger, plan, name, ids, speeds, keep_s=0 if idx == len(plan.models) - 1 else until_s)
    if plan.settings:
        return
    with suppress(TimeIsUpError), ledger.step("exact: published shape", needs_s=5 if plan.simulate else 25):
        model = make(ledger, plan, plan.models[0], num_layers=1, dtype="float32")
        check_exact(ledger, f"{plan.models[0]}, 1 layer", model.folder, plan.place, ids=[i % 256 for i in ids[:24]],
                    num_new=8 if plan.simulate else 24, shares=(0.25, 1.0))  # fmt: skip


def check_demo(ledger: Ledger, plan: Plan, ids: list[int]) -> None:
    """The bundled model's ids on the device and on the CPU, as published and in float32 (whose verdict counts)."""
    with suppress(TimeIsUpError), ledger.step("exact: demo model"):
        num_new = 8 if plan.simulate else 48
        for name, folder in {
            "demo": demo_folder(), "demo float32": copy_as_float32(demo_folder(), plan.scratch / "demo32"),
        }.items():  # fmt: skip
            check_exact(ledger, name, folder, plan.place, ids=ids[:24], num_new=num_new, shares=(0.25, 1.0))


def bench_model(ledger: Ledger, plan: Plan, name: str, ids: list[int], speeds: Bandwidths, *, keep_s: float) -> None:
    """One shape at all shares; what is not begun when `keep_s` seconds are left is left out."""
    with suppress(TimeIsUpError), ledger.step(f"{name}: make"):
        model = make(ledger, plan, name, num_layers=plan.num_layers(name), dtype="bfloat16")
        ids = [token_id % (256 if plan.simulate else VOCAB) for token_id in ids]
        bench = Bench(ledger=ledger, place=plan.place, speeds=speeds, ids=ids, work=plan.work)
        for share in plan.shares:
            if ledger.left_s < keep_s:
                ledger.add("skipped", where=f"{name} {share:.0%}", why="the time of this model is spent")
                continue
            level = Level(name=name, model=model, share=share)
            settings = ["auto", "compiled"] if share == 1 else list(SETTINGS)
            settings = list(plan.settings) or settings
            if plan.simulate and "compiled" in settings:  # compiling for the CPU takes longer than all the rest
                settings.remove("compiled")
            if plan.settings:
                run_level(bench, level, settings)
            elif share == 1:
                run_level(bench, level, settings, lambda _: resident_transformers(model, plan.place))
            elif share == plan.shares[0]:
                run_level(bench, level, settings,
                          lambda vram: [offloaded_transformers(model, plan.place, vram_bytes=vram)])  # fmt: skip
            else:
                run_level(bench, level, [name for name in settings if name != "compiled"])
        if not plan.keeps:
            shutil.rmtree(model.folder)


def make(ledger: Ledger, plan: Plan, name: str, *, num_layers: int, dtype: str) -> MadeModel:
    """Write a checkpoint into the scratch folder."""
    begin_s = ledger.left_s
    model = make_model(
        plan.scratch / f"{name}-{num_layers}-{dtype}", name, num_layers=num_layers,
        vocab_size=256 if plan.simulate else VOCAB, dtype=dtype,
        overrides=FAMILIES[name].tiny if plan.simulate else None, reuse=plan.keeps,
    )  # fmt: skip
    ledger.add(
        "model", model=name, layers=num_layers, dtype=dtype, experts=model.num_experts, top_k=model.top_k,
        expert_bytes=model.expert_bytes, all_experts_bytes=model.all_experts_bytes,
        resident_bytes=model.resident_bytes, make_s=begin_s - ledger.left_s,
    )  # fmt: skip
    return model
