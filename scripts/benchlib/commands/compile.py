"""What compiling the decode step saves: milliseconds a layer, eager and compiled, in turn at the same token.

    scripts/bench compile --families qwen3_moe,gpt_oss --layers 12 --out benchmarks/DATE-compiled-steps.md

Models of the tests' tiny width, so that the host's work a layer is all there is. "resident" has experts that answer
zero; "whole" has all experts cached. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import families
import torch

import benchlib.test_helpers  # noqa: F401
import offmoe
from benchlib.command_line import make_parser
from benchlib.machine import describe_machine, describe_versions
from offmoe.decode.compiled import DecodeCompiler
from offmoe.engine.parts import parts_of
from offmoe.engine.step import Forward
from offmoe.hf.internals import experts_modules

ROOT = Path(__file__).resolve().parents[3]

NUM_PROMPT = 32


def main(argv: Sequence[str]) -> int:
    """Command line entry; returns the exit code."""
    parser = make_parser(__doc__)
    parser.add_argument("--families", default="qwen3_moe,mixtral,deepseek_v3,gpt_oss,olmoe")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--steps", type=int, default=200, help="of each way, in blocks of ten")
    parser.add_argument("--context", type=int, default=256, help="rows that the compiled step attends to")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cpu-time", action="store_true", help="time of this thread's work, on a busy machine")
    parser.add_argument("--out", type=Path, help="file for the table")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    rows = [measure(name, args) for name in args.families.split(",")]
    if args.out:
        args.out.write_text(_render(rows, args))
    print(json.dumps(rows))
    return 0


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One family's row."""
    with tempfile.TemporaryDirectory() as folder:
        families.save_layout(_deep(name, args.layers, args.context), Path(folder), "published")
        with offmoe.load(folder, ram="8GiB", context_length=args.context, compile="on", device=args.device) as engine:
            begin = time.perf_counter()
            engine.generate(list(range(3, 3 + NUM_PROMPT)), max_new_tokens=4, temperature=0, ignore_eos=True)
            row: dict[str, Any] = {"family": name, "layers": args.layers, "state": engine.stats()["compile"]}
            row["first_reply_s"] = round(time.perf_counter() - begin, 1)
            if row["state"] == "on":
                row["whole_ms"] = _alternate(engine, args)
                for _, module in experts_modules(engine.model):
                    module._offmoe_binding.executor = None  # type: ignore[union-attr]
                row["resident_ms"] = _alternate(engine, args)
    print(row, file=sys.stderr)
    return row


def _deep(name: str, num_layers: int, context: int) -> Any:
    """The tests' tiny model with more layers."""
    family = families.FAMILIES[name]
    changes: dict[str, object] = {"num_hidden_layers": num_layers, "max_position_embeddings": context}
    if "layer_types" in family.config:
        kinds = family.config["layer_types"]
        assert isinstance(kinds, list)
        changes["layer_types"] = (kinds * num_layers)[:num_layers]
    families.FAMILIES[name] = dataclasses.replace(family, config={**family.config, **changes})
    try:
        return families.build(name)
    finally:
        families.FAMILIES[name] = family


def _alternate(engine: offmoe.Engine, args: argparse.Namespace) -> dict[str, float]:
    """Milliseconds a layer: medians over steps, and the median of the blocks' ratios."""
    compiler = parts_of(engine).decode
    assert isinstance(compiler, DecodeCompiler) and compiler.cache is not None, f"{compiler=}"
    step = compiler._step
    assert step is not None
    ids = torch.tensor([[5]], device=engine.model.device)
    position = args.context - 8

    def compiled() -> None:
        step(ids, position).argmax().item()

    def eager() -> None:
        step.static.seek(position)
        step.static.hand_back(position)
        forward = Forward(engine.model, compiler.cache)
        forward.position = position
        forward(ids).argmax().item()

    times: dict[str, list[float]] = {"eager": [], "compiled": []}
    ratios = []
    for block in range(max(1, args.steps // 10)):
        pair = [("eager", eager), ("compiled", compiled)]
        blocks = {key: _time(run, args.cpu_time) for key, run in (pair if block % 2 else pair[::-1])}
        ratios.append(statistics.median(blocks["eager"]) / statistics.median(blocks["compiled"]))
        for key in times:
            times[key] += blocks[key]
    result = {key: round(statistics.median(values) * 1e3 / args.layers, 3) for key, values in times.items()}
    return {**result, "ratio": round(statistics.median(ratios), 2)}


def _time(run: Callable[[], None], cpu_time: bool, num: int = 10) -> list[float]:
    clock = time.thread_time if cpu_time else time.perf_counter
    times = []
    for _ in range(num):
        begin = clock()
        run()
        times.append(clock() - begin)
    return times


def _render(rows: list[dict[str, Any]], args: argparse.Namespace) -> str:
    lines = [
        "# Compiled decode steps", "",
        f"- command: `scripts/bench compile {' '.join(sys.argv[1:])}`",
        f"- machine: {describe_machine()}", f"- versions: {describe_versions(ROOT)}", "",
        f"Milliseconds {'of the thread ' if args.cpu_time else ''}a layer, eager and compiled steps in turn: medians; "
        "the ratio is the median of the blocks' ratios.",
        "", "| family | resident eager | compiled | ratio | whole eager | compiled | ratio | first reply s |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        if "whole_ms" not in row:
            lines.append(f"| {row['family']} | {row['state']} |")
            continue
        cells = [f"{row[kind][key]}" for kind in ("resident_ms", "whole_ms") for key in ("eager", "compiled", "ratio")]
        lines.append(f"| {row['family']} | {' | '.join(cells)} | {row['first_reply_s']} |")
    return "\n".join(lines) + "\n"
