"""`offmoe bench`: ids from a file, a text or the model's vocabulary; progress on stderr."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from offmoe.base.errors import UsageError
from offmoe.cli.session import open_engine
from offmoe.report.progress import ProgressReporter

if TYPE_CHECKING:
    from offmoe.generation.engine import Engine

DEFAULT_DECODE = 64
DEFAULT_TEXT = "Return a list of the lines of the file, without their ends. "


def run_bench_command(
    model: str | None, options: dict[str, Any], ids: list[int] | None, prompt: str | None, prefill: int,
    decode: int | None, *, quiet: bool,
) -> dict[str, Any]:  # fmt: skip
    """The record of one run."""
    from offmoe.report.bench import run_bench

    if ids is not None and prompt is not None:
        raise UsageError("give --ids or --prompt, not both")
    if ids is None:
        ids = _text_ids(model, prompt, prefill + (decode or DEFAULT_DECODE))
    if decode is not None:
        if prefill + decode > len(ids):
            raise UsageError(
                f"--prefill {prefill} and --decode {decode} need {prefill + decode} ids, there are {len(ids)}"
            )
        ids = ids[: prefill + decode]

    def make_engine() -> Engine:
        return open_engine(model, options, quiet=quiet)

    with ProgressReporter(quiet=quiet) as progress:
        return run_bench(make_engine, ids, prefill=prefill, progress=progress)


def _text_ids(model: str | None, prompt: str | None, count: int) -> list[int]:
    """`count` ids of the prompt, repeated when it is short."""
    from transformers import AutoTokenizer

    from offmoe.checkpoint.locate import demo_model_folder, locate_model

    folder = demo_model_folder() if model is None else locate_model(model)
    try:
        ids = list(AutoTokenizer.from_pretrained(folder)(prompt or DEFAULT_TEXT)["input_ids"])
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{folder} has no readable tokenizer ({' '.join(str(error).split())[:120]}); use --ids"
        ) from None
    if not ids:
        raise UsageError("--prompt is empty; give at least one token")
    return (ids * (count // len(ids) + 1))[:count]
