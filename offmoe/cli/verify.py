"""`offmoe verify`: prints one line a cache size and the verdict."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from offmoe.base.errors import UsageError
from offmoe.base.machine import rss_bytes
from offmoe.base.units import format_percent
from offmoe.cli.options import print_json
from offmoe.cli.quantize import read_eval_text
from offmoe.cli.session import check_request, open_engine
from offmoe.report.progress import ProgressReporter

if TYPE_CHECKING:
    from offmoe.generation.engine import Engine


def run_verify(
    model: str | None, options: dict[str, Any], prompt: str, num_new: int, text_file: Path | None, *, as_json: bool
) -> int:  # fmt: skip
    """Exit code 0 when every size agrees with the oracle, 1 when one does not. `fast_activations` are priced, too."""
    check_request(model, options, quiet=as_json)
    if text_file is not None and not options.get("fast_activations"):
        raise UsageError("--eval is what --fast-activations is priced on; add that, or leave out --eval")
    text = None if text_file is None else read_eval_text(text_file)
    from offmoe.generation.prompt import encode
    from offmoe.report.verify import verify

    def engine_with(slots: int | None) -> Engine:
        if slots is None:
            return open_engine(model, options, quiet=True)
        # The libraries are here already, and what the engine before has left is not this one's: count from now.
        return open_engine(model, {**options, "experts": slots}, quiet=True, baseline_bytes=rss_bytes())

    def choose_ids(engine: Engine) -> list[int]:
        if engine.tokenizer is None:
            return [(7 * position + 3) % engine.vocab_size for position in range(16)]
        return encode(prompt, engine.tokenizer, vocab_size=engine.vocab_size)

    with ProgressReporter(quiet=as_json) as progress:
        results = verify(engine_with, choose_ids, num_new, progress)
    for result in results:
        if not as_json:
            click.echo(
                f"{result.slots:6d} slots: ids {'equal' if result.ids_equal else 'DIFFER'}, logits differ by at most "
                f"{result.max_relative_difference:.1e} of the largest, hits {format_percent(result.hit_rate)}"
            )
    passed = all(result.passed for result in results)
    record: dict[str, Any] = {"passed": passed, "sizes": [result.as_dict() for result in results]}
    if not as_json:
        lossy = ", both with int8 activations" if options.get("fast_activations") else ""
        click.echo(f"cached output {'equals' if passed else 'DIFFERS from'} uncached output{lossy}")
    if options.get("fast_activations"):
        record["fast_activations"] = _price(model, options, text, choose_ids, quiet=as_json)
    if as_json:
        print_json(record)
    return 0 if passed else 1


def _price(
    model: str | None, options: dict[str, Any], text: str | None, choose_ids: Callable[[Engine], list[int]], *,
    quiet: bool,
) -> dict[str, Any] | None:  # fmt: skip
    """On the CPU, where all of it is rounded: beside a device it is less. None where nothing is."""
    from offmoe.generation.prompt import encode
    from offmoe.report.price import own_text, price

    options = {**{name: value for name, value in options.items() if name not in ("vram", "miss")}, "device": "cpu"}
    with (
        open_engine(model, options, quiet=True, baseline_bytes=rss_bytes()) as engine,
        ProgressReporter(quiet=quiet) as progress,
    ):
        if not engine.lossy:
            if not quiet:
                click.echo(next(note for note in engine.stats()["notes"] if "fast_activations" in note))
            return None
        if text is None:
            ids, what = own_text(engine, choose_ids(engine)), "the model's own text"
        elif engine.tokenizer is None:
            raise UsageError(f"{engine.folder} has no tokenizer, which --eval needs")
        else:
            ids, what = encode(text, engine.tokenizer, vocab_size=engine.vocab_size), "the text"
        found = price(engine, ids, lambda done, total: progress("pricing int8 activations", done, total))
    if not quiet:
        click.echo(f"int8 activations on {found.exact.num_tokens} tokens of {what}: {found.line()}")
    return found.as_dict()
