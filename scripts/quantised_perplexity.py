"""What `offmoe quantize` costs in quality: the demo model's perplexity on held-out text, by format.

    python scripts/quantised_perplexity.py --out benchmarks/DATE-quantised-demo.md

The text is the demo model's held-out documents (prose, code, reference topics and chat about the standard library, in
equal parts), in windows of 512 tokens that overlap by half. Progress goes to
stderr; the last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchlib.machine import describe_machine, describe_model, describe_versions
from demo_corpus import KINDS, Document, load_documents
from demo_eval import windows

import offmoe
from offmoe.engine.parts import parts_of
from offmoe.quantize.write import QuantiseOptions, quantise
from offmoe.report.perplexity import Perplexity, perplexity

ROOT = Path(__file__).resolve().parent.parent
DEMO_MODEL = ROOT / "offmoe" / "demo_model"
FORMATS = (
    QuantiseOptions(expert_format="int8"),
    QuantiseOptions(expert_format="int4"),
    QuantiseOptions(expert_format="int4", group=64),
    QuantiseOptions(expert_format="int8", dense="int8"),
    QuantiseOptions(expert_format="int4", dense="int8"),
    QuantiseOptions(expert_format="int4", dense="int4"),
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model: what it is called, bytes of all tensors and of the experts, and the loss on each kind of text."""

    name: str
    total_bytes: int
    expert_bytes: int
    by_kind: dict[str, Perplexity]

    @property
    def overall(self) -> Perplexity:
        """Over all kinds, token by token."""
        return Perplexity(
            num_tokens=sum(part.num_tokens for part in self.by_kind.values()),
            nats=sum(part.nats for part in self.by_kind.values()),
        )


def measure(folder: Path, name: str, documents: list[Document], tokens_per_kind: int) -> Row:
    by_kind = {}
    with offmoe.load(folder) as engine:
        assert engine.tokenizer is not None
        for kind in KINDS:
            pieces: list[torch.Tensor] = list(windows(engine.tokenizer, documents, kind))
            ids = torch.cat(pieces, dim=1)[0, :tokens_per_kind].tolist()
            by_kind[kind] = perplexity(engine, ids)
            print(f"{name}: {kind} {by_kind[kind].value:.3f}", file=sys.stderr)
        parts = parts_of(engine)
        return Row(name=name, total_bytes=parts.index.num_bytes, expert_bytes=parts.experts.num_bytes, by_kind=by_kind)


def measure_all(tokens_per_kind: int) -> list[Row]:
    documents = load_documents(seed=0)
    rows = [measure(DEMO_MODEL, "bfloat16, as published", documents, tokens_per_kind)]
    for options in FORMATS:
        dense = f", other linear layers {options.dense}" if options.dense else ""
        name = f"experts {options.expert_format}, groups of {options.group}{dense}"
        with tempfile.TemporaryDirectory() as folder:
            quantise(DEMO_MODEL, Path(folder) / "quantised", options, lambda stage, done, total: None)
            rows.append(measure(Path(folder) / "quantised", name, documents, tokens_per_kind))
    return rows


def change(row: Row, base: Row, kind: str | None = None) -> str:
    now, then = (r.overall if kind is None else r.by_kind[kind] for r in (row, base))
    return f"{100 * (now.value / then.value - 1):+.2f}%"


def render(rows: Sequence[Row]) -> str:
    """The result file."""
    base = rows[0]
    model = {key: value for key, value in describe_model(DEMO_MODEL).items() if not key.endswith("_bytes")}
    lines = [
        f"# Quantised demo model: perplexity, {datetime.date.today().isoformat()}",
        "",
        f"- command: `{shlex.join(['python', 'scripts/quantised_perplexity.py', *sys.argv[1:]])}`",
        f"- machine: {', '.join(f'{key} {value}' for key, value in describe_machine().items())}",
        f"- versions: {', '.join(f'{key} {value}' for key, value in describe_versions(ROOT).items())}",
        f"- model: {', '.join(f'{key} {value}' for key, value in model.items())}",
        f"- work: {base.overall.num_tokens} held-out tokens, windows of up to 512 that overlap by half",
        "",
        "Each model is what `offmoe quantize` writes from the bundled one, read by the engine. Embeddings (tied to the "
        "output head here), routers and norms stay in bfloat16. The text is the demo model's held-out documents, the "
        "same number of tokens of each kind.",
        "",
        f"| weights | all tensors | experts | perplexity | change | {' | '.join(KINDS)} |",
        "|---" * (5 + len(KINDS)) + "|",
    ]
    for row in rows:
        sizes = f"{row.total_bytes / 1e6:.2f} MB | {row.expert_bytes / 1e6:.2f} MB"
        by_kind = (f"{row.by_kind[kind].value:.3f} ({change(row, base, kind)})" for kind in KINDS)
        lines.append(
            f"| {row.name} | {sizes} | {row.overall.value:.4f} | {change(row, base)} | {' | '.join(by_kind)} |"
        )
    return "\n".join([*lines, ""])


def as_json(rows: Sequence[Row]) -> dict[str, Any]:
    return {
        row.name: {"bytes": row.total_bytes, "perplexity": row.overall.value, "tokens": row.overall.num_tokens}
        for row in rows
    }


def main(argv: Sequence[str] | None = None) -> int:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of each kind of text (2048)")
    parser.add_argument("--out", type=Path, help="write the result as Markdown")
    args = parser.parse_args(argv)
    rows = measure_all(args.tokens)
    text = render(rows)
    print(text)
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    print(json.dumps(as_json(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
