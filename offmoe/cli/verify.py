"""`offmoe verify`: prints one line a cache size and the verdict."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from offmoe.cli.options import print_json
from offmoe.cli.session import check_request, open_engine
from offmoe.core.units import format_percent
from offmoe.machine.memory import rss_bytes
from offmoe.report.progress import ProgressReporter

if TYPE_CHECKING:
    from offmoe.engine.engine import Engine


def run_verify(model: str | None, options: dict[str, Any], prompt: str, num_new: int, *, as_json: bool) -> int:
    """Exit code 0 when every size agrees with the oracle, 1 when one does not."""
    check_request(model, options, quiet=as_json)
    from offmoe.engine.prompt import encode_prompt
    from offmoe.report.verify import verify_output

    def engine_with(slots: int | None) -> Engine:
        if slots is None:
            return open_engine(model, options, quiet=True)
        # The libraries are here already, and what the engine before has left is not this one's: count from now.
        return open_engine(model, {**options, "expert_slots": slots}, quiet=True, baseline_bytes=rss_bytes())

    def choose_ids(engine: Engine) -> list[int]:
        if engine.tokenizer is None:
            return [(7 * position + 3) % engine.vocab_size for position in range(16)]
        return encode_prompt(prompt, engine.tokenizer, vocab_size=engine.vocab_size)

    with ProgressReporter(quiet=as_json) as progress:
        results = verify_output(engine_with, choose_ids, num_new, progress)
    for result in results:
        if not as_json:
            click.echo(
                f"{result.slots:6d} slots: ids {'equal' if result.ids_equal else 'DIFFER'}, logits differ by at most "
                f"{result.max_relative_difference:.1e} of the largest, hits {format_percent(result.hit_rate)}"
            )
    passed = all(result.passed for result in results)
    if as_json:
        print_json({"passed": passed, "sizes": [result.as_dict() for result in results]})
    else:
        click.echo(f"cached output {'equals' if passed else 'DIFFERS from'} uncached output")
    return 0 if passed else 1
