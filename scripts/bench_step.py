"""Times of a prompt and of a decoded token with every expert in RAM, beside the machine's streaming read.

    python scripts/bench_step.py --model checkpoints/qwen3.5-moe                     # offmoe
    python scripts/bench_step.py --model checkpoints/qwen3.5-moe --transformers      # transformers alone
    python scripts/bench_step.py --model ... --against /path/to/another/commit       # both at once, in turn

With `--against` two processes hold the model, this tree's and the other's, and take turns: twelve tokens each, the
other standing still. `ratio`: the median over turns of this tree's median token over the other's, `turns` its
quartiles; `prompt_ratio` the same for prompts.

Ids are given (the model's ids.json), so every run does the same work; the first pass is not timed. `mb_token` is what a
token must read: resident weights but for the embedding, and top-k experts a layer. `share` is `mb_token` over the
median token, over the fastest of some streaming reads in the same process. The last stdout line is JSON.
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

TURN = 12
NUM_SKIPPED = 8  # steps after the prompt, while caches settle


def main() -> int:
    """Run what the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder with an ids.json")
    parser.add_argument("--prefill", type=int, default=64, help="ids in the prompt (default: 64)")
    parser.add_argument("--decode", type=int, default=60, help="tokens after it (default: 60)")
    parser.add_argument("--ram", default="14GiB", help="budget; it must hold all experts (default: 14GiB)")
    parser.add_argument("--turns", type=int, default=24, help="with --against (default: 24)")
    parser.add_argument("--against", type=Path, help="checkout of another commit, its kernels built")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--transformers", action="store_true", help="measure transformers' own model")
    options = parser.parse_args()
    if options.against is not None:
        print(json.dumps(in_turn(options)))
        return 0
    ids = json.loads((options.model / "ids.json").read_text())[: options.prefill + options.decode]
    if options.worker:
        return work(options, ids)
    measure = with_transformers if options.transformers else with_offmoe
    print(json.dumps(measure(options, ids)))
    return 0


def with_offmoe(options: argparse.Namespace, ids: list[int]) -> dict[str, Any]:
    """Times of `offmoe.load`'s engine."""
    import offmoe

    quiet: dict[str, Any] = {"prefetch": "off", "compile": "off", "warm_start": False}
    with offmoe.load(options.model, ram=options.ram, **quiet) as engine:

        def run(prompt: list[int], rest: list[int]) -> list[float]:
            marks, left = [time.perf_counter()], iter(rest)

            def choose(ids: Any, logits: Any) -> int:
                marks.append(time.perf_counter())
                return next(left)

            engine.generate(prompt, max_new_tokens=len(rest), choose=choose, ignore_end=True, reuse=False)
            return marks

        found = measured(run, ids, options.prefill)
        stats, model = engine.stats(), engine.model
        layers = engine._parts.experts.layers
        found |= {"path": stats.get("decode_path"), "reason": stats.get("decode_path_reason")}
        found |= {"hit_rate": round(stats["hit_rate"], 4), "version": offmoe.__file__}
        token_bytes = resident_bytes(model) + engine.top_k * sum(layer.expert_bytes for layer in layers)
    return found | shares(token_bytes, found["token_ms"])


def work(options: argparse.Namespace, ids: list[int]) -> int:
    """Measure whenever a line comes: "prompt", or "tokens" for the next TURN of a reply that never ends."""
    import offmoe

    quiet: dict[str, Any] = {"prefetch": "off", "compile": "off", "warm_start": False}
    prompt, given = ids[: options.prefill], ids[options.prefill :]
    with offmoe.load(options.model, ram=options.ram, tell=None, **quiet) as engine:
        rest: Iterator[int] = iter(given)
        choose: dict[str, Any] = {"choose": lambda ids, logits: next(rest), "ignore_end": True, "reuse": False}
        engine.generate(prompt, max_new_tokens=len(given), **choose)  # what it needs is in RAM now
        pieces = None
        for line in sys.stdin:
            if line.strip() == "prompt":
                rest, began = iter(given), time.perf_counter()
                engine.generate(prompt, max_new_tokens=1, **choose)
                times = [time.perf_counter() - began]
            else:
                if pieces is None:
                    rest = itertools.cycle(given)
                    pieces = engine.stream(prompt, max_new_tokens=1000, **choose)
                    next(pieces)
                times = []
                for _ in range(TURN):
                    began = time.perf_counter()
                    next(pieces)
                    times.append(time.perf_counter() - began)
            print(json.dumps(times), flush=True)
    return 0


def in_turn(options: argparse.Namespace) -> dict[str, Any]:
    """This tree's offmoe and another's, turn by turn."""
    trees = (Path(__file__).resolve().parents[1], options.against)
    command = [
        sys.executable,
        "-W",
        "ignore",
        __file__,
        "--worker",
        "--model",
        str(options.model),
        "--ram",
        options.ram,
    ]
    command += ["--prefill", str(options.prefill), "--decode", str(options.decode)]
    workers = [
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": str(tree)},
        )
        for tree in trees
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

    @torch.inference_mode()
    def run(prompt: list[int], rest: list[int]) -> list[float]:
        marks, past, next_ids = [time.perf_counter()], None, prompt
        for token in rest:
            output = model(torch.tensor([next_ids]), past_key_values=past, use_cache=True, logits_to_keep=1)
            past, next_ids = output.past_key_values, [token]
            marks.append(time.perf_counter())
        return marks

    return measured(run, ids, options.prefill)


def measured(run: Callable[[list[int], list[int]], list[float]], ids: list[int], num_prompt: int) -> dict[str, Any]:
    """Median prompt and median token, in milliseconds, of `run(prompt, given)` -> times of begin and of each logits."""
    run(ids[:num_prompt], ids[num_prompt:])
    marks = run(ids[:num_prompt], ids[num_prompt:])
    steps = [after - before for before, after in zip(marks[NUM_SKIPPED:-1], marks[NUM_SKIPPED + 1 :], strict=True)]
    prompts = [marks[1] - marks[0]]
    for _ in range(2):
        begin, first = run(ids[:num_prompt], ids[num_prompt : num_prompt + 1])
        prompts.append(first - begin)
    return {
        "prompt_ms": ms(statistics.median(prompts)),
        "token_ms": ms(statistics.median(steps)),
        "best_ms": ms(min(steps)),
    }


def resident_bytes(model: Any) -> int:
    """Bytes of weights that every token reads: all that are loaded but for an embedding with a head beside it."""
    tied = model.config.get_text_config().tie_word_embeddings
    loaded = [tensor for tensor in (*model.parameters(), *model.buffers()) if not tensor.is_meta]
    num_bytes: int = sum(tensor.nbytes for tensor in loaded)
    return num_bytes if tied else num_bytes - int(model.get_input_embeddings().weight.nbytes)


def shares(token_bytes: int, token_ms: float) -> dict[str, Any]:
    """The machine's streaming read, and how much of it a token reached."""
    read = streaming_read()
    reached = token_bytes / token_ms * 1e3
    return {
        "mb_token": round(token_bytes / 1e6), "read_gb_s": round(read / 1e9, 1), "share": round(reached / read, 3)
    }  # fmt: skip


def streaming_read() -> float:
    """Bytes a second of summing 1 GiB, the fastest of four."""
    numbers = torch.ones(1 << 27, dtype=torch.int64)
    times = []
    for _ in range(4):
        began = time.perf_counter()
        numbers.sum()
        times.append(time.perf_counter() - began)
    return numbers.nbytes / min(times)


def ms(seconds: float) -> float:
    """Milliseconds, to a microsecond."""
    return round(1e3 * seconds, 3)


if __name__ == "__main__":
    sys.exit(main())
