"""Times of a prompt and of a decoded token with every expert in RAM, beside the machine's streaming read.

    scripts/bench step --model checkpoints/qwen3.5-moe                     # offmoe
    scripts/bench step --model checkpoints/qwen3.5-moe --transformers      # transformers alone
    scripts/bench step --model ... --against /path/to/another/commit       # both at once, in turn
    scripts/bench step --model ... --set pack=on --against-set pack=off    # two settings of this commit

With `--against` two processes hold the model, this tree's and the other's, and take turns: twelve tokens each, the
other standing still. `ratio`: the median over turns of this tree's median token over the other's, `turns` its
quartiles; `prompt_ratio` the same for prompts.

Ids are given (the model's ids.json), so every run does the same work; the first pass is not timed. `mb_token` is what a
token must read: resident weights but for the embedding, and top-k experts a layer. Every few tokens the same process
sums 1 GiB: `read_gb_s` is the median of these, and `share` what the median token reads in a second over that;
`best_share` compares the fastest token with the fastest sum. The last stdout line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchlib.command_line import make_parser

TURN = 12
NUM_SKIPPED = 8  # steps after the prompt, while caches settle
READ_EVERY = 4  # steps


def main(argv: Sequence[str]) -> int:
    """Run what the command line says."""
    parser = make_parser(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder with an ids.json")
    parser.add_argument("--prefill", type=int, default=64, help="ids in the prompt (default: 64)")
    parser.add_argument("--decode", type=int, default=60, help="tokens after it (default: 60)")
    parser.add_argument("--ram", default="14GiB", help="budget; it must hold all experts (default: 14GiB)")
    parser.add_argument("--turns", type=int, default=24, help="with --against (default: 24)")
    parser.add_argument("--against", type=Path, help="checkout of another commit, its kernels built")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="an option of offmoe.load")
    parser.add_argument("--against-set", action="append", default=[], metavar="NAME=VALUE", help="the other's options")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--transformers", action="store_true", help="measure transformers' own model")
    options = parser.parse_args(argv)
    if options.against is not None or options.against_set:
        print(json.dumps(in_turn(options)))
        return 0
    ids = json.loads((options.model / "ids.json").read_text())[: options.prefill + options.decode]
    if options.worker:
        return work(options, ids)
    measure = with_transformers if options.transformers else with_offmoe
    print(json.dumps(measure(options, ids)))
    return 0


QUIET: dict[str, Any] = {"prefetch": "off", "compile": "off", "warm_start": False}


def with_offmoe(options: argparse.Namespace, ids: list[int]) -> dict[str, Any]:
    """Times of `offmoe.load`'s engine."""
    import offmoe
    from offmoe.engine.parts import parts_of

    with offmoe.load(options.model, ram=options.ram, **QUIET, **settings(options.set)) as engine:
        found = measured(lambda prompt, rest: engine_steps(engine, prompt, iter(rest), len(rest)), ids, options.prefill)
        stats, model = engine.stats(), engine.model
        layers = parts_of(engine).experts.layers
        found |= {"path": stats.get("decode_path"), "reason": stats.get("decode_path_reason")}
        found |= {"hit_rate": round(stats["hit_rate"], 4), "version": offmoe.__file__}
        token_bytes = resident_bytes(model) + engine.top_k * sum(layer.expert_bytes for layer in layers)
    return found | shares(token_bytes, found)


def engine_steps(engine: Any, prompt: list[int], rest: Iterator[int], num_new: int) -> Iterator[Any]:
    """A reply of given ids, a step at a time; the first one is the prompt."""
    choose: dict[str, Any] = {"choose": lambda ids, logits: next(rest), "ignore_eos": True, "reuse": False}
    pieces: Iterator[Any] = engine.stream(prompt, max_new_tokens=num_new, **choose)
    return pieces


def settings(given: list[str]) -> dict[str, Any]:
    """Options written NAME=VALUE."""
    return dict(item.split("=", 1) for item in given)


def work(options: argparse.Namespace, ids: list[int]) -> int:
    """Measure whenever a line comes: "prompt", or "tokens" for the next TURN of a reply that never ends."""
    import offmoe

    prompt, given = ids[: options.prefill], ids[options.prefill :]
    with offmoe.load(options.model, ram=options.ram, tell=None, **QUIET, **settings(options.set)) as engine:
        list(engine_steps(engine, prompt, iter(given), len(given)))  # what it needs is in RAM now
        pieces = None
        for line in sys.stdin:
            if line.strip() == "prompt":
                times = [timed_prompt(engine_steps(engine, prompt, iter(given), 1))]
            else:
                if pieces is None:
                    pieces = engine_steps(engine, prompt, itertools.cycle(given), 1000)
                    next(pieces)
                times = [timed(pieces) for _ in range(TURN)]
            print(json.dumps(times), flush=True)
    return 0


def in_turn(options: argparse.Namespace) -> dict[str, Any]:
    """This tree's offmoe and another's, turn by turn."""
    here = Path(__file__).resolve().parents[3]
    trees = (here, options.against or here)
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "benchlib.command_line",
        "step",
        "--worker",
        "--model",
        str(options.model.resolve()),
        "--ram",
        options.ram,
    ]
    command += ["--prefill", str(options.prefill), "--decode", str(options.decode)]
    workers = [
        subprocess.Popen(
            [*command, *(part for item in given for part in ("--set", item))], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True, cwd=tree,  # "-m" puts the folder first of all
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tree), str(here / "scripts")])},
        )
        for tree, given in zip(trees, (options.set, options.against_set), strict=True)
    ]  # fmt: skip

    def ask(what: str) -> list[float]:
        found: list[float] = []
        for worker in workers:
            assert worker.stdin is not None and worker.stdout is not None
            print(what, file=worker.stdin, flush=True)
            found.append(statistics.median(json.loads(worker.stdout.readline())))
        return found

    try:
        prompts = [ask("prompt") for _ in range(options.turns // 4)]
        ask("tokens")
        turns = [ask("tokens") for _ in range(options.turns)]
    finally:
        for worker in workers:
            worker.terminate()
    ratios = [ours / theirs for ours, theirs in turns]
    return {
        "token_ms": [ms(statistics.median(times)) for times in zip(*turns, strict=True)],
        "ratio": round(statistics.median(ratios), 3),
        "turns": [round(quartile, 3) for quartile in statistics.quantiles(ratios)],
        "prompt_ms": [ms(statistics.median(times)) for times in zip(*prompts, strict=True)],
        "prompt_ratio": round(statistics.median(ours / theirs for ours, theirs in prompts), 3),
    }


def with_transformers(options: argparse.Namespace, ids: list[int]) -> dict[str, Any]:
    """Times of the model as transformers runs it, in the checkpoint's type."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")

    def run(prompt: list[int], rest: list[int]) -> Iterator[None]:
        past, next_ids = None, prompt
        for token in rest:
            with torch.inference_mode():
                output = model(torch.tensor([next_ids]), past_key_values=past, use_cache=True, logits_to_keep=1)
            past, next_ids = output.past_key_values, [token]
            yield

    return measured(run, ids, options.prefill)


def measured(run: Callable[[list[int], list[int]], Iterator[Any]], ids: list[int], num_prompt: int) -> dict[str, Any]:
    """Median prompt and token of `run(prompt, given)`, milliseconds, and the rate of reads beside them."""
    prompt, rest = ids[:num_prompt], ids[num_prompt:]
    for _ in run(prompt, rest):
        pass
    steps, numbers = run(prompt, rest), torch.ones(1 << 27, dtype=torch.int64)
    prompts, times, reads = [timed(steps)], [], []
    for number in range(1, len(rest)):
        seconds = timed(steps)
        if number > NUM_SKIPPED:
            times.append(seconds)
        if number % READ_EVERY == 0:
            reads.append(timed(numbers.sum() for _ in range(1)))
    list(steps)
    prompts += [timed_prompt(run(prompt, rest[:1])) for _ in range(2)]
    rates = [numbers.nbytes / seconds / 1e9 for seconds in reads]
    return {
        "prompt_ms": ms(statistics.median(prompts)),
        "token_ms": ms(statistics.median(times)),
        "best_ms": ms(min(times)),
        "read_gb_s": round(statistics.median(rates), 1),
        "best_read_gb_s": round(max(rates), 1),
    }


def timed(steps: Iterator[Any]) -> float:
    """Seconds of the next step."""
    began = time.perf_counter()
    next(steps)
    return time.perf_counter() - began


def timed_prompt(steps: Iterator[Any]) -> float:
    """Seconds of the first step; the reply is ended then."""
    seconds = timed(steps)
    list(steps)
    return seconds


def resident_bytes(model: Any) -> int:
    """Bytes of weights that every token reads: all that are loaded but for an embedding with a head beside it."""
    tied = model.config.get_text_config().tie_word_embeddings
    loaded = [tensor for tensor in (*model.parameters(), *model.buffers()) if not tensor.is_meta]
    num_bytes: int = sum(tensor.nbytes for tensor in loaded)
    return num_bytes if tied else num_bytes - int(model.get_input_embeddings().weight.nbytes)


def shares(token_bytes: int, found: dict[str, Any]) -> dict[str, Any]:
    """Shares of the machine's streaming read that a token reached: the median and the best."""
    share, best = (
        round(token_bytes / 1e6 / found[time] / found[read], 3)
        for time, read in (("token_ms", "read_gb_s"), ("best_ms", "best_read_gb_s"))
    )
    return {"mb_token": round(token_bytes / 1e6), "share": share, "best_share": best}


def ms(seconds: float) -> float:
    """Milliseconds, to a microsecond."""
    return round(1e3 * seconds, 3)
