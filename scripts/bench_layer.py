"""Time what a decoder layer and a token cost on the CPU, with layers computed whole and module after module, in turn.

    python scripts/make_checkpoint.py --like qwen3-30b-a3b --tiny --layers 24 --out checkpoints/tiny-24
    python scripts/bench_layer.py checkpoints/tiny-24 --cold 64MB      # fixed costs: the weights are nearly nothing
    python scripts/bench_layer.py checkpoints/qwen3-6l --out benchmarks/DATE-cpu-layer.md

All experts are cached. `layer us` is the median of one call of a decoder layer, over layers and tokens; `rest us` what
a token takes beside its layers: embedding, mask, rotary angles, last norm, logits, sampling; `token ms` both, as timed.
With `--cold`, that much memory is read before each layer, outside of what is timed, so that no cache holds the layer's
code and weights; without, layers follow each other as always. Systems: `joined` computes all layers in one call, of
which a layer has its share (and `--cold` reads memory once a token), `layers` each layer in two calls, `modules` its
norms, linears and attention one by one, `torch` nothing. A table goes to stderr, one JSON object to stdout, last.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from benchlib.machine import describe_machine, describe_versions
from benchlib.report import without_folders
from benchlib.sizes import parse_bytes
from torch import nn

import offmoe
from offmoe.base.errors import OffmoeError
from offmoe.models.native_layer import LayerStep
from offmoe.models.native_model import DecoderStep
from offmoe.models.native_moe import MoeStep
from offmoe.models.native_run import LayerRun

ROOT = Path(__file__).parents[1]
SYSTEMS = ("joined", "layers", "modules", "torch")
PROMPT = list(range(3, 35))


@dataclass(frozen=True, kw_only=True)
class Timed:
    """One system: medians over all rounds."""

    system: str
    layer_us: float
    rest_us: float
    token_ms: float


@dataclass
class Stopwatch:
    """When every decoder layer began and ended."""

    cold: torch.Tensor | None
    layer_s: list[float] = field(default_factory=list)
    touching_s: float = 0.0
    _begin_s: float = 0.0

    def before(self, *_: object) -> None:
        """Reads memory, then starts."""
        if self.cold is not None:
            begin = time.perf_counter()
            self.cold.numpy().sum()  # on this thread alone: torch's others would go on spinning for a while
            self.touching_s += time.perf_counter() - begin
        self._begin_s = time.perf_counter()

    def after(self, *_: object) -> None:
        """Stops."""
        self.layer_s.append(time.perf_counter() - self._begin_s)

    @contextmanager
    def on(self, layers: Sequence[nn.Module]) -> Iterator[None]:
        """Within: by hooks of each."""
        handles = [layer.register_forward_pre_hook(self.before) for layer in layers]
        handles += [layer.register_forward_hook(self.after) for layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def on_runs(self) -> Iterator[None]:
        """Within: by the calls that compute several, of which each layer has its share."""
        forward = LayerRun.forward

        def timed(run: LayerRun, hidden: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor | None:
            self.before()
            state = forward(run, hidden, kwargs)
            seconds = time.perf_counter() - self._begin_s
            assert state is not None, "layers could not be joined"
            self.layer_s += [seconds / len(run.layers)] * len(run.layers)
            return state

        with mock.patch.object(LayerRun, "forward", timed):
            yield


class Systems:
    """Puts the model's modules into one of the ways to run them."""

    def __init__(self, model: nn.Module) -> None:
        self._swapped = {module: module.__dict__["forward"] for module in model.modules() if "forward" in vars(module)}

    def use(self, system: str) -> None:
        """From now on."""
        left_out: dict[str, tuple[type, ...]] = {
            "joined": (), "layers": (DecoderStep,), "modules": (DecoderStep, LayerStep, MoeStep), "torch": (object,),
        }  # fmt: skip
        for module, forward in self._swapped.items():
            module.__dict__.pop("forward", None)
            if not isinstance(getattr(forward, "__self__", None), left_out[system]):
                module.__dict__["forward"] = forward


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The longest of the model's lists of modules."""
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len)


def time_tokens(engine: offmoe.Engine, num_tokens: int, watch: Stopwatch) -> tuple[list[float], list[float]]:
    """Microseconds of every layer call, and of every token what is not in its layers."""
    times: list[float] = []
    marks: list[tuple[int, float]] = []

    def choose(ids: torch.Tensor, logits: torch.Tensor) -> int:
        times.append(time.perf_counter())
        marks.append((len(watch.layer_s), watch.touching_s))
        return int(logits.argmax())

    engine.generate(PROMPT, max_new_tokens=num_tokens + 1, choose=choose, ignore_end=True)
    layers, rests = [], []
    for i in range(1, len(times)):
        (first, touched), (last, touched_after) = marks[i - 1], marks[i]
        inside = watch.layer_s[first:last]
        layers += inside
        rests.append(times[i] - times[i - 1] - sum(inside) - (touched_after - touched))
    return [1e6 * s for s in layers], [1e6 * s for s in rests]


def bench(engine: offmoe.Engine, args: argparse.Namespace) -> list[Timed]:
    """Rounds of all systems in turn."""
    cold = torch.ones(parse_bytes(args.cold) // 4) if args.cold else None
    watch, systems = Stopwatch(cold), Systems(engine.model)
    layers = decoder_layers(engine.model)
    found: dict[str, tuple[list[float], list[float]]] = {system: ([], []) for system in args.systems}
    for round_idx in range(args.rounds + 1):
        for system in args.systems:
            systems.use(system)
            with watch.on_runs() if system == "joined" else watch.on(layers):
                layer_us, rest_us = time_tokens(engine, args.tokens, watch)
            if round_idx:  # the first one warms up
                found[system][0].extend(layer_us)
                found[system][1].extend(rest_us)
    systems.use("joined")
    return [
        Timed(
            system=system, layer_us=median(layer_us), rest_us=median(rest_us),
            token_ms=(median(layer_us) * len(layers) + median(rest_us)) / 1e3,
        )
        for system, (layer_us, rest_us) in found.items()
    ]  # fmt: skip


def table(found: Sequence[Timed]) -> list[str]:
    """As Markdown."""
    lines = ["| system | layer us | rest us | token ms |", "|" + "---|" * 4]
    return lines + [f"| {t.system} | {t.layer_us:.0f} | {t.rest_us:.0f} | {t.token_ms:.2f} |" for t in found]


def report(found: Sequence[Timed], facts: dict[str, Any], command: Sequence[str]) -> str:
    """The result file."""
    machine, versions = describe_machine(), describe_versions(ROOT)
    assert __doc__ is not None
    return "\n".join([
        f"# A decoder layer's token on the CPU, {datetime.datetime.now(datetime.timezone.utc).date()}",
        "",
        f"- command: `{shlex.join(['python', 'scripts/bench_layer.py', *without_folders(command)])}`",
        f"- machine: {', '.join(f'{key} {value}' for key, value in machine.items())}",
        f"- versions: {', '.join(f'{name} {version}' for name, version in versions.items())}",
        f"- {', '.join(f'{key}: {value}' for key, value in facts.items())}",
        "",
        *table(found),
        "",
        __doc__.split("\n\n")[2].replace("\n", " "),
        "",
    ])  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit code."""
    command = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a checkpoint folder")
    parser.add_argument("--cold", help="memory to read before each layer, such as 64MB (default: none)")
    parser.add_argument("--tokens", type=int, default=32, help="a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--systems", default=",".join(SYSTEMS), help="with commas (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=None, help="default: as many as torch has")
    parser.add_argument("--out", type=Path, help="also write a result file")
    args = parser.parse_args(command)
    args.systems = args.systems.split(",")
    unknown = sorted(set(args.systems) - set(SYSTEMS))
    if unknown:
        print(f"error: {', '.join(unknown)} not known; systems are {', '.join(SYSTEMS)}", file=sys.stderr)
        return 2
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        with offmoe.load(args.model, prefetch="off", compile="off", context_length=512) as engine:
            num_experts = engine.stats()["experts_total"]
            kernels = engine.stats()["cpu_kernels"]
            cached = engine.stats()["experts_cached"]
            facts = {"kernels": kernels[0], "experts cached": f"{cached} of {num_experts}", "cold": args.cold or "no"}
            found = bench(engine, args)
    except OffmoeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(table(found)), file=sys.stderr)
    if args.out is not None:
        args.out.write_text(report(found, facts, command))
    print(json.dumps({"bench": "layer", **facts, "records": [asdict(timed) for timed in found]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
