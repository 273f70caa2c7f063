"""Time tokens of a model that caches latents (DeepSeek's attention): read as they are by the CPU kernels or by torch's
operations, and expanded.

    python scripts/make_checkpoint.py --like deepseek-v2-lite --layers 2 --out checkpoints/deepseek-2l
    python scripts/bench_latent.py checkpoints/deepseek-2l --ram 1.5GiB --out benchmarks/DATE-latent-attention.md

The prompt is read once for each length; then tokens are decoded, four of each way in turn, and the medians kept.
Growth is what the process took at its peak beyond what it had before, which `--ram` is the budget of; it is told of the
first length alone, before any token expands. A table goes to stderr, one JSON object to stdout, last.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from benchlib.machine import describe_machine, describe_versions
from benchlib.report import without_folders

import offmoe
from offmoe.base.errors import OffmoeError
from offmoe.base.machine import peak_rss_bytes, rss_bytes
from offmoe.models.latent_attention import LatentAttention
from offmoe.models.native_latent import LatentStep
from offmoe.models.native_layer import step_of

ROOT = Path(__file__).parents[1]
TURN = 4
WAYS = ("kernels", "latents", "expanded")


@dataclass(frozen=True, kw_only=True)
class Timed:
    """Medians after a prompt of `num_tokens`; `growth_bytes` before any token expanded its context."""

    num_tokens: int
    prompt_s: float
    kernels_ms: float
    latents_ms: float
    expanded_ms: float
    growth_bytes: int | None


class Switch:
    """Turns the attention of one model."""

    def __init__(self, model: torch.nn.Module) -> None:
        parts = [part for m in model.modules() for part in vars(m).values()]
        self._found = [part for part in parts if isinstance(part, LatentAttention)]
        self._steps = [step for m in model.modules() if (step := step_of(m, LatentStep)) is not None]

    def __len__(self) -> int:
        return sum(part.absorbs for part in self._found)

    def use(self, way: str) -> None:
        """From now on; a name of `WAYS`. Without kernels the first is as the second."""
        for part in self._found:
            part.absorbs = way != "expanded"
        for step in self._steps:
            vars(step.module).pop("forward", None)
            if way == "kernels":
                vars(step.module)["forward"] = step.forward


def time_tokens(engine: offmoe.Engine, num_tokens: int, num_new: int, base_bytes: int | None) -> Timed:
    """One prompt, some tokens that read latents, and then turns of both."""
    switch = Switch(engine.model)
    times: list[float] = []
    growth_bytes: int | None = None

    def choose(ids: torch.Tensor, logits: torch.Tensor) -> int:
        nonlocal growth_bytes
        if len(times) == TURN and base_bytes is not None:
            growth_bytes = peak_rss_bytes() - base_bytes
        switch.use(WAYS[len(times) // TURN % len(WAYS)])
        times.append(time.perf_counter())
        return int(logits.argmax())

    prompt = [5 + (7 * i) % 30000 for i in range(num_tokens)]
    begin = time.perf_counter()
    engine.generate(prompt, max_new_tokens=num_new + 1, choose=choose, ignore_end=True)
    switch.use(WAYS[0])
    spent = [after - before for before, after in zip(times, times[1:], strict=False)]
    ways: list[list[float]] = [[] for _ in WAYS]
    for i, seconds in enumerate(spent):
        if i % TURN:  # the first of a turn warms up
            ways[i // TURN % len(WAYS)].append(1e3 * seconds)
    kernels_ms, latents_ms, expanded_ms = map(median, ways)
    return Timed(
        num_tokens=num_tokens, prompt_s=times[0] - begin, kernels_ms=kernels_ms, latents_ms=latents_ms,
        expanded_ms=expanded_ms, growth_bytes=growth_bytes,
    )  # fmt: skip


def table(found: Sequence[Timed]) -> list[str]:
    """As Markdown."""
    heads = (
        "tokens of context",
        "prompt s",
        "token by kernels ms",
        "latents by torch ms",
        "expanded ms",
        "ratio",
        "growth",
    )
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return lines + [
        f"| {t.num_tokens} | {t.prompt_s:.1f} | {t.kernels_ms:.1f} | {t.latents_ms:.1f} | {t.expanded_ms:.1f} | "
        f"{t.expanded_ms / t.kernels_ms:.1f}x | {'-' if t.growth_bytes is None else format(t.growth_bytes, ',')} |"
        for t in found
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit code."""
    command = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a checkpoint folder")
    parser.add_argument("--ram", default=None, help="as of offmoe.load (default: auto)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[3900, 1024, 256], help="(default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=32, help="decoded after each prompt (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="also write a result file")
    args = parser.parse_args(command)
    base_bytes = rss_bytes()
    context = max(args.lengths) + args.tokens + 8
    try:
        with offmoe.load(args.model, ram=args.ram, context_length=context) as engine:
            if not len(Switch(engine.model)):
                print(
                    f"error: {args.model.name} caches no latents; take a model with DeepSeek's attention",
                    file=sys.stderr,
                )
                return 2
            found = [
                time_tokens(engine, length, args.tokens, None if i else base_bytes)
                for i, length in enumerate(args.lengths)
            ]
            budget = engine.stats()["ram_bytes"]
    except OffmoeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(table(found)), file=sys.stderr)
    if args.out is not None:
        assert __doc__ is not None
        lines = [
            f"# Latent attention, {datetime.datetime.now(datetime.timezone.utc).date()}", "",
            f"- command: `{shlex.join(['python', 'scripts/bench_latent.py', *without_folders(command)])}`",
            f"- machine: {', '.join(f'{key} {value}' for key, value in describe_machine().items())}",
            f"- versions: {', '.join(f'{name} {version}' for name, version in describe_versions(ROOT).items())}",
            f"- budget: {budget:,} bytes", "", *table(found), "", __doc__.split("\n\n")[2].replace("\n", " "), "",
        ]  # fmt: skip
        args.out.write_text("\n".join(lines))
    print(json.dumps({"bench": "latent", "budget_bytes": budget, "records": [asdict(timed) for timed in found]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
