"""`offmoe trace`: generate from prompts, and keep what the routers chose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from offmoe.cli.prompts_file import read_prompts
from offmoe.cli.session import check_request, open_engine
from offmoe.core.saved_flags import refuse_unwritable
from offmoe.core.units import format_bytes
from offmoe.report.progress import ProgressReporter
from offmoe.trace.file import check_trace_output
from offmoe.trace.reader import read_trace


def run_trace(
    model: str | None, engine_given: dict[str, Any], sampling: dict[str, Any], prompts_file: Path, output: Path, *,
    whole: bool, guesses: bool, force: bool, quiet: bool,
) -> dict[str, Any]:  # fmt: skip
    """The record of one run. After Ctrl-C the trace has what was whole, and that is said."""
    check_request(model, engine_given, quiet=quiet)
    prompts = read_prompts(prompts_file, whole=whole)
    refuse_unwritable(output, "the trace")
    check_trace_output(output, overwrite=force)
    from offmoe.engine.trace_run import encode_all, record_prompts

    with open_engine(model, engine_given, quiet=quiet) as engine:
        ids = encode_all(engine, prompts)
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            with ProgressReporter(quiet=quiet) as progress:
                record_prompts(
                    engine, ids, output, max_new_tokens=sampling["max_new_tokens"], guesses=guesses,
                    about={"file": prompts_file.name}, overwrite=force,
                    sampling={name: value for name, value in sampling.items() if name != "max_new_tokens"},
                    progress=lambda done, total: progress("tokens", done, total),
                )  # fmt: skip
        except KeyboardInterrupt:
            if output.is_file():
                click.echo(f"{output}: {read_trace(output).note}", err=True)
            raise
        stats = engine.stats().as_dict()
    if not output.is_file():  # a pipe or a device: it cannot be read back
        return {"trace": str(output), "prompts": len(ids), "engine": stats}
    trace = read_trace(output)
    size = output.stat().st_size
    if not quiet:
        click.echo(
            f"{output}: {trace.num_decoded} decoded tokens of {len(ids)} prompts, {len(trace.events)} layer calls, "
            f"{format_bytes(size)}"
        )
    return {
        "trace": str(output), "model_hash": trace.header.model_hash, "prompts": len(ids),
        "decoded_tokens": trace.num_decoded, "layer_calls": len(trace.events), "bytes": size, "engine": stats,
    }  # fmt: skip
