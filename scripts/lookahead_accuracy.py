"""Share of a layer's experts that earlier layers name ahead of time, against the previous token's experts.

    python scripts/lookahead_accuracy.py
    python scripts/lookahead_accuracy.py --model checkpoints/qwen3-6l --tokens 2000 --out benchmarks/DATE-lookahead.md

Teacher-forced on the demo model's held-out documents (prose, code, reference topics and chat about the standard
library, in equal parts). `state`: the router of a layer 1, 2 or 3 layers on is asked about the state after this
layer's attention, before its experts; `output`: about the layer's output. `previous token`: the experts that the same
layer used last, going back until there are as many as are guessed. Progress goes to stderr; the last line on stdout is
one JSON object.

Shapes: T tokens, G guesses, K experts a token, E experts, X what a state has besides.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from benchlib.errors import ScriptError
from benchlib.machine import describe_machine, describe_model, describe_versions
from demo_corpus import KINDS, load_documents
from demo_eval import windows
from torch import nn

import offmoe
from offmoe.core.errors import OffmoeError
from offmoe.engine.parts import parts_of
from offmoe.hf.internals import experts_modules
from offmoe.routers.predictor import ids_given_to_experts
from offmoe.routers.routing import RoutingMap, map_routing

ROOT = Path(__file__).resolve().parent.parent
DEMO_MODEL = ROOT / "offmoe" / "demo_model"
DISTANCES = (1, 2, 3)
SOURCES = ("state", "output")
PREVIOUS = "previous token"


@dataclass
class Tally:
    """Experts used, and how many of them had been named, by layer."""

    named: dict[int, int] = field(default_factory=dict)
    used: dict[int, int] = field(default_factory=dict)

    def add(self, layer_idx: int, guesses_TG: torch.Tensor, used_TK: torch.Tensor) -> None:
        hits_TK = (guesses_TG[:, :, None] == used_TK[:, None, :]).any(dim=1)
        self.named[layer_idx] = self.named.get(layer_idx, 0) + int(hits_TK.sum())
        self.used[layer_idx] = self.used.get(layer_idx, 0) + used_TK.numel()

    def share(self, layers: Sequence[int] | None = None) -> float | None:
        layers = [idx for idx in self.used if layers is None or idx in layers]
        used = sum(self.used[idx] for idx in layers)
        return sum(self.named[idx] for idx in layers) / used if used else None


class Guesses:
    """Sees one forward: what each source names for each layer, and what the layer then uses.

    The first token of a window has no previous one and counts nowhere.
    """

    is_asleep = False

    def __init__(self, model: Any, found: RoutingMap, num_experts: int) -> None:
        self.tallies: dict[tuple[str, int, int], Tally] = {}
        self._found, self._num_experts = found, num_experts
        self._guessed: dict[int, list[tuple[str, int, torch.Tensor, torch.Tensor | None]]] = {}
        for layer_idx, (_, module) in enumerate(experts_modules(model)):
            self._watch(layer_idx, module)

    def observe_state(self, layer_idx: int, state_TX: torch.Tensor) -> None:
        """The layers after this one, from its state after attention."""
        self._ask("state", state_TX, self._found.order.index(layer_idx) + 1)

    def observe_input(self, layer_idx: int, state_TX: torch.Tensor) -> None:
        """This layer and those after it, from the output of the layer before."""
        place = self._found.order.index(layer_idx)
        if place > 0:
            self._ask("output", state_TX, place)

    def _ask(self, source: str, state_TX: torch.Tensor, first: int) -> None:
        for distance, layer_idx in zip(DISTANCES, self._found.order[first:], strict=False):
            predictor = self._found.predictors[layer_idx]
            ids_TK = None if predictor is None else predictor(state_TX)
            if predictor is not None and ids_TK is not None:
                scores_TE = predictor.scores(state_TX)
                wide_TG = None if scores_TE is None else scores_TE.topk(2 * ids_TK.shape[1]).indices
                self._guessed.setdefault(layer_idx, []).append((source, distance, ids_TK, wide_TG))

    def _watch(self, layer_idx: int, module: nn.Module) -> None:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            ids = ids_given_to_experts(args, kwargs)
            self._settle(layer_idx, ids.reshape(-1, ids.shape[-1]))

        module.register_forward_pre_hook(see, with_kwargs=True)

    def _settle(self, layer_idx: int, used_TK: torch.Tensor) -> None:
        for source, distance, ids_TK, wide_TG in self._guessed.pop(layer_idx, []):
            for times, guesses_TG in ((1, ids_TK), (2, wide_TG)):
                if guesses_TG is not None:
                    self._tally(source, distance, times).add(layer_idx, guesses_TG[1:], used_TK[1:])
        for times in (1, 2):
            recent_TG = torch.tensor(list(most_recent(used_TK.tolist(), times * used_TK.shape[1])))
            self._tally(PREVIOUS, 0, times).add(layer_idx, recent_TG, used_TK[1:])

    def _tally(self, source: str, distance: int, times: int) -> Tally:
        return self.tallies.setdefault((source, distance, times), Tally())


def most_recent(used: Sequence[Sequence[int]], num_guesses: int) -> Iterator[list[int]]:
    """For each token but the first: the experts used last before it, -1 where there are not that many yet."""
    recent: dict[int, None] = {}
    for ids_K in used[:-1]:
        for expert_idx in reversed(ids_K):
            recent.pop(expert_idx, None)
            recent[expert_idx] = None
        latest = list(reversed(recent))[:num_guesses]
        yield latest + [-1] * (num_guesses - len(latest))


@torch.no_grad()
def measure(folder: Path, num_tokens: int, ram: str) -> tuple[Guesses, dict[str, Any]]:
    """Run the model over the documents. Raises OffmoeError for a folder that does not load."""
    documents = load_documents(seed=0)
    with offmoe.load(str(folder), ram=ram) as engine:
        if engine.tokenizer is None:
            raise ScriptError(f"{folder} has no tokenizer, and the documents are text")
        found = map_routing(engine.model)
        layer = parts_of(engine).experts.layers[0]
        guesses = Guesses(engine.model, found, layer.num_experts)
        hooks, counted = found.install(guesses), 0
        for kind in KINDS:
            rest = num_tokens // len(KINDS)
            for ids in windows(engine.tokenizer, documents, kind):
                if rest < 2:
                    break
                engine.model(input_ids=ids[:, :rest], use_cache=False)
                counted += min(rest, ids.shape[1]) - 1
                rest -= ids.shape[1]
                print(f"\r{kind}: {counted} tokens", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
        hooks.remove()
    return guesses, {"tokens": counted, "top_k": layer.top_k, "order": found.order, "num_experts": layer.num_experts}


def tables(guesses: Guesses, facts: dict[str, Any]) -> list[str]:
    """All layers together by source and distance, then layer by layer at top-k guesses."""
    order, top_k = facts["order"], facts["top_k"]
    lines = [
        f"| guessed from | {top_k} guesses | {2 * top_k} guesses | layers |",
        "|---|---|---|---|",
    ]
    names = [(source, distance) for source in SOURCES for distance in DISTANCES if len(order) > distance]
    names = [name for name in names if (*name, 1) in guesses.tallies]
    for source, distance in names:
        row = [percent(share_of(guesses, source, distance, times)) for times in (1, 2)]
        lines.append(f"| {source}, {distance} on | {' | '.join(row)} | {distance + 1} to {len(order)} |")
    row = [percent(share_of(guesses, PREVIOUS, 0, times, order[1:])) for times in (1, 2)]
    lines.append(f"| {PREVIOUS} | {' | '.join(row)} | 2 to {len(order)} |")
    row = [percent(times * top_k / facts["num_experts"]) for times in (1, 2)]
    lines += [f"| chance | {' | '.join(row)} | |", ""]
    heads = [f"{source}, {distance} on" for source, distance in names] + [PREVIOUS]
    lines += [f"| layer ({top_k} guesses) | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for place, layer_idx in enumerate(order[1:], start=2):
        shares = [share_of(guesses, source, distance, 1, [layer_idx]) for source, distance in [*names, (PREVIOUS, 0)]]
        lines.append(f"| {place} | {' | '.join(map(percent, shares))} |")
    return lines


def share_of(
    guesses: Guesses, source: str, distance: int, times: int, layers: Sequence[int] | None = None
) -> float | None:
    tally = guesses.tallies.get((source, distance, times))
    return None if tally is None else tally.share(layers)


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}%"


def render(folder: Path, facts: dict[str, Any], lines: Sequence[str]) -> str:
    """The result file."""
    model = {key: value for key, value in describe_model(folder).items() if not key.endswith("_bytes")}
    return "\n".join([
        f"# Lookahead accuracy: {folder.resolve().name}, {datetime.date.today().isoformat()}",
        "",
        f"- command: `{shlex.join(['python', 'scripts/lookahead_accuracy.py', *map(shorten, sys.argv[1:])])}`",
        f"- machine: {', '.join(f'{key} {value}' for key, value in describe_machine().items())}",
        f"- versions: {', '.join(f'{key} {value}' for key, value in describe_versions(ROOT).items())}",
        f"- model: {', '.join(f'{key} {value}' for key, value in model.items())}",
        f"- work: {facts['tokens']} held-out tokens, teacher-forced, windows of up to 512",
        "",
        "Share of the experts that a layer really used which had been named. " + " ".join(summary_lines()),
        "",
        *lines,
        "",
    ])  # fmt: skip


def summary_lines() -> list[str]:
    """What this file's docstring says of the rows."""
    return ((__doc__ or "").split("\n\n")[2]).replace("\n", " ").split(" Progress goes")[0].split("  ")


def shorten(argument: str) -> str:
    """No folders of this machine in a result file."""
    return Path(argument).name if argument.startswith("/") else argument


def as_json(guesses: Guesses, folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    shares = [
        {
            "source": source, "distance": distance, "guesses": times * facts["top_k"], "share": tally.share(),
            "by_layer": {str(idx): tally.share([idx]) for idx in tally.used},
        }
        for (source, distance, times), tally in sorted(guesses.tallies.items())
    ]  # fmt: skip
    return {"model": folder.resolve().name, "tokens": facts["tokens"], "top_k": facts["top_k"], "shares": shares}


def main(argv: Sequence[str] | None = None) -> int:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=DEMO_MODEL, help="checkpoint folder (default: the demo model)")
    parser.add_argument("--tokens", type=int, default=4096, help="held-out tokens (default: 4096)")
    parser.add_argument("--ram", default="auto", help="offmoe's --ram (default: auto)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch (default: its own)")
    parser.add_argument("--out", type=Path, help="result file, Markdown (default: none)")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    try:
        guesses, facts = measure(args.model, args.tokens, args.ram)
        lines = tables(guesses, facts)
        if args.out is not None:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(render(args.model, facts, lines), encoding="utf-8")
    except (ScriptError, OffmoeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    print(json.dumps(as_json(guesses, args.model, facts)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
