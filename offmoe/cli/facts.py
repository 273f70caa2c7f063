"""The commands that say what is there and what fits, before anything is loaded: `inspect`, `probe` and `plan`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from offmoe.cli.options import (
    EXPERT_FORMATS,
    REVISION_HELP,
    engine_options,
    json_option,
    print_json,
    split_engine_options,
    user_errors,
)
from offmoe.core.config import EngineConfig, make_config
from offmoe.core.units import GIB

BUDGETS_GIB = (4, 8, 12, 16, 24, 32, 48, 64)  # of --formats
DOES_NOT_FIT = 1  # the exit code of a plan that is one; 2 is for what cannot be planned


@click.command()
@click.argument("model", required=False)
@click.option("--revision", metavar="NAME", help=REVISION_HELP)
@json_option
@user_errors
def inspect(model: str | None, revision: str | None, as_json: bool) -> None:
    """Layers, experts and sizes of a checkpoint, from its headers alone: nothing else of a hub id is fetched."""
    from offmoe.checkpoint.hub.headers import locate_headers
    from offmoe.planner.inspect import inspect_checkpoint
    from offmoe.report.progress import ProgressReporter
    from offmoe.report.tables import inspection_rows, print_pairs

    known = make_config(revision=revision).revision
    with ProgressReporter(quiet=as_json) as progress, locate_headers(model, progress, known) as folder:
        found = inspect_checkpoint(folder)
    if as_json:
        print_json(found.as_dict())
    else:
        print_pairs(str(folder.name), inspection_rows(found))


@click.command()
@click.option("--model", help="Measure the drive of this model's folder. Default: that of the bundled model.")
@click.option("--path", type=click.Path(path_type=Path), help="Measure the drive of this file or folder. Only read.")
@click.option("--refresh", is_flag=True, help="Measure again what was measured before.")
@json_option
@user_errors
def probe(model: str | None, path: Path | None, refresh: bool, as_json: bool) -> None:
    """Measure this machine once, in some seconds: memory, experts on the CPU, link and drive. `plan` uses it."""
    from offmoe.cli.probe import probe_machine
    from offmoe.report.probe_table import probe_rows
    from offmoe.report.tables import print_pairs

    record = probe_machine(model, path, refresh=refresh, quiet=as_json)
    if as_json:
        print_json(record.as_dict())
    else:
        print_pairs(record.name, probe_rows(record))


@click.command()
@click.argument("model", required=False)
@click.option(
    "--for",
    "machine",
    metavar="MACHINE",
    help='Another machine than this one: "RTX 4060", "ram=32GB,vram=8GB,link=13GB/s".',
)
@click.option("--trace", type=click.Path(path_type=Path), help="Hit rates from this trace of the model.")
@click.option("--expert-format", type=click.Choice(EXPERT_FORMATS), help="Plan for experts as quantize writes them.")
@click.option("--formats", is_flag=True, help="A table instead: formats of the experts against budgets of RAM.")
@click.option("--prompt-tokens", type=click.IntRange(1), metavar="N", help="The prompt whose time is predicted.")
@engine_options
@json_option
@user_errors
def plan(
    model: str | None, machine: str | None, trace: Path | None, prompt_tokens: int | None, formats: bool, as_json: bool,
    **options: Any,
) -> None:  # fmt: skip
    """Plan sizes, placement and speed from config and headers, before anything is loaded.

    A hub id needs no download of weights. The exit code is 1 for a model that does not fit, where "fits" is false in
    JSON.
    """
    from offmoe.planner.make_plan import run_plan
    from offmoe.report.plan_table import plan_tables
    from offmoe.report.progress import ProgressReporter
    from offmoe.report.tables import print_pairs

    engine_given, others = split_engine_options(options)
    if formats:
        show_formats(model, make_config(**engine_given), machine, trace, as_json=as_json)
        return
    with ProgressReporter(quiet=as_json) as progress:
        found = run_plan(
            model, make_config(**engine_given), machine=machine, trace=trace, prompt_tokens=prompt_tokens,
            progress=progress, **others,
        )  # fmt: skip
    if as_json:
        print_json(found.as_dict())
    else:
        for title, rows in plan_tables(found):
            print_pairs(title, rows)
            click.echo()
        click.echo(found.line())
    if found.memory is None:
        sys.exit(DOES_NOT_FIT)


def show_formats(
    model: str | None, config: EngineConfig, machine: str | None, trace: Path | None, *, as_json: bool
) -> None:
    """Print the table of `plan --formats`."""
    from offmoe.planner.make_plan import plan_formats, plan_subject
    from offmoe.report.plan_table import format_lines
    from offmoe.report.progress import ProgressReporter

    with ProgressReporter(quiet=as_json) as progress:
        subject = plan_subject(model, config, machine=machine, trace=trace, progress=progress)
    rows = plan_formats(subject, config, [number * GIB for number in BUDGETS_GIB])
    if as_json:
        print_json({
            "model": subject.facts.name,
            "formats": [
                {
                    "expert_format": row.expert_format, "total_bytes": row.total_bytes,
                    "budgets": [
                        {
                            "ram_bytes": budget, "fits": plan.memory is not None,
                            "decode_tok_per_s": None if (speed := plan.prediction) is None else speed.decode_tok_per_s,
                        }
                        for budget, plan in row.plans.items()
                    ],
                }
                for row in rows
            ],
        })  # fmt: skip
        return
    where = "this machine" if subject.record is None else subject.record.name
    click.echo(f"{subject.facts.name} on {where}: predicted tok/s with --ram of")
    click.echo("\n".join(format_lines(rows)))
