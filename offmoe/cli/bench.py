"""`offmoe bench`: ids from a file, a text or the model's vocabulary; progress on stderr."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from offmoe.cli.session import check_request, open_engine
from offmoe.core.errors import UsageError
from offmoe.report.progress import ProgressReporter

if TYPE_CHECKING:
    from offmoe.engine.engine import Engine

DEFAULT_DECODE = 64
DEFAULT_TEXT = "Return a list of the lines of the file, without their ends. "


def run_bench_command(
    model: str | None, options: dict[str, Any], ids: list[int] | None, prompt: str | None, prefill: int,
    decode: int | None, *, warm: bool, quiet: bool,
) -> dict[str, Any]:  # fmt: skip
    """The record of one run."""
    if ids is not None and prompt is not None:
        raise UsageError("give --ids or --prompt, not both")
    check_request(model, options, quiet=quiet)
    from offmoe.report.bench import run_bench

    def make_engine() -> Engine:
        return open_engine(model, options, quiet=quiet)

    def choose_ids(engine: Engine) -> list[int]:
        given = ids if ids is not None else _text_ids(engine, prompt, prefill + (decode or DEFAULT_DECODE))
        if decode is not None and prefill + decode > len(given):
            raise UsageError(
                f"--prefill {prefill} and --decode {decode} need {prefill + decode} ids, there are {len(given)}"
            )
        return given if decode is None else given[: prefill + decode]

    with ProgressReporter(quiet=quiet) as progress:
        return run_bench(make_engine, choose_ids, prefill=prefill, warm=warm, progress=progress)


def _text_ids(engine: Engine, prompt: str | None, count: int) -> list[int]:
    """`count` ids of the prompt, repeated when it is short; of the vocabulary for a model without a tokenizer."""
    from offmoe.engine.prompt import encode_prompt

    if engine.tokenizer is None and prompt is None:
        return [(7 * position + 3) % engine.vocab_size for position in range(count)]
    text = DEFAULT_TEXT if prompt is None else prompt
    ids = encode_prompt(text, engine.tokenizer, vocab_size=engine.vocab_size)
    return (ids * (count // len(ids) + 1))[:count]
