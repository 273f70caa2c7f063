"""`offmoe tune` and `offmoe replay`: cache size against hit rate and speed, as a table, a chart, a picture or JSON."""

from __future__ import annotations

import shutil
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from offmoe.checkpoint.identity import model_hash
from offmoe.cli.prompts_file import read_prompts
from offmoe.cli.session import check_request, open_engine
from offmoe.core.saved_flags import SavedFlags, default_path, refuse_unwritable, write_flags
from offmoe.core.units import format_bandwidth, format_bytes, format_percent, format_seconds
from offmoe.memory.budget import suggested_mib
from offmoe.planner.tuning import Curves, TokenCosts, make_curves, token_costs
from offmoe.report.curves import chart_lines, table_lines
from offmoe.report.plot import check_plot, write_plot
from offmoe.report.progress import ProgressReporter
from offmoe.trace.file import Trace
from offmoe.trace.reader import read_trace

if TYPE_CHECKING:
    from offmoe.engine.engine import Engine

# Of a model with a tokenizer, where the user names no prompts: prose, code, dialogue, a list.
PROMPTS = (
    "Once upon a time, in a small village by the sea,",
    "def read_lines(path):\n    ",
    "User: How do I boil an egg?\nAssistant:",
    "The three most important causes of the war were",
)
# Ids for a model without one, and tokens that are decoded to learn what a token costs.
NUM_IDS, COST_TOKENS = 16, 48


class Shown:
    """Looks of the results: `plot` a file or None; `colour` None means where the terminal has it."""

    def __init__(self, *, as_json: bool, plot: Path | None, no_color: bool, force: bool = False) -> None:
        self.as_json, self.plot, self.no_color = as_json, plot, no_color
        if plot is not None:
            check_plot(plot, overwrite=force)
            refuse_unwritable(plot, "the plot")

    def show(self, curves: Curves, title: str) -> None:
        """Table and chart to stdout, the picture to its file."""
        if self.plot is not None:
            write_plot(curves, title, self.plot)
        if self.as_json:
            return
        width = shutil.get_terminal_size((80, 24)).columns
        click.echo(textwrap.fill(title, width))
        click.echo("\n".join(table_lines(curves, width)))
        click.echo()

        def colour(text: str, name: str) -> str:
            return text if self.no_color else click.style(text, fg=name)

        for line in chart_lines(curves, width, colour=colour):
            click.echo(line, color=False if self.no_color or not sys.stdout.isatty() else None)
        if self.plot is not None:
            click.echo(f"plot: {self.plot}")


def run_replay(trace_file: Path, shown: Shown, *, fit: int | None) -> dict[str, Any]:
    """Replay a trace at each cache size; no model is needed. `fit`: slots to mark."""
    trace = read_trace(trace_file)
    _say_note(trace_file, trace)
    with ProgressReporter(quiet=shown.as_json) as progress:
        curves = make_curves(trace, costs=None, fit=fit, progress=lambda done, total: progress("replay", done, total))
    shown.show(curves, _title(trace, curves))
    return {"model": trace.header.model, "note": trace.note, "curves": curves.as_dict()}


def run_tune(
    model: str | None, engine_given: dict[str, Any], shown: Shown, *, trace_file: Path | None,
    prompts_file: Path | None, max_new_tokens: int, config: str | None, choose: str,
) -> dict[str, Any]:  # fmt: skip
    """Measure, replay, show, and write the chosen flags to the file `config`: "off" none, None the user's own."""
    folder = check_request(model, engine_given, quiet=shown.as_json)
    target = None if config == "off" else default_path() if config is None else Path(config)
    if target is not None:
        refuse_unwritable(target, "the chosen flags")
    identity = model_hash(folder)
    prompts = list(PROMPTS) if prompts_file is None else read_prompts(prompts_file, whole=False)
    trace = None if trace_file is None else read_trace(trace_file, model_hash=identity)
    if trace_file is not None and trace is not None:
        _say_note(trace_file, trace)
    given = {"prefetch": "off", **engine_given}
    with open_engine(model, given, quiet=shown.as_json, use_saved=False) as engine:
        if engine.plan.computing_slots >= engine.plan.num_experts:
            return _everything_fits(engine, shown)
        trace, costs = _measure(engine, prompts, trace, max_new_tokens, quiet=shown.as_json)
        plan = engine.plan
    fit = plan.computing_slots
    with ProgressReporter(quiet=shown.as_json) as progress:
        curves = make_curves(
            trace, costs=costs, fit=fit, slot_bytes=plan.slot_bytes if plan.device is None else plan.device.slot_bytes,
            progress=lambda done, total: progress("replay", done, total),
        )  # fmt: skip
    slots = min(curves.knee, fit) if choose == "knee" else fit
    memory = plan if plan.device is None else plan.device
    name, allowed = ("ram", plan.ram_bytes) if plan.device is None else ("vram", plan.device.vram_bytes)
    need = min(suggested_mib(memory.fixed_bytes + slots * memory.slot_bytes), allowed >> 20)
    bound = {"expert_slots": slots} if "expert_slots" in engine_given else {name: f"{need}MiB"}
    flags = {**bound, "policy": curves.adopted}
    shown.show(curves, _title(trace, curves))
    if not shown.as_json:
        _say_choice(curves, slots, costs)
    if target is not None:
        write_flags(target, identity, folder.name, flags)
        if not shown.as_json:
            click.echo(f"written: {SavedFlags(path=target, flags=flags).line()}")
    return {
        "model": folder.name, "everything_fits": False, "note": trace.note, "flags": flags,
        "config": None if target is None else str(target),
        "costs": None if costs is None else vars(costs), "curves": curves.as_dict(),
    }  # fmt: skip


def _everything_fits(engine: Engine, shown: Shown) -> dict[str, Any]:
    plan = engine.plan
    memory = plan.total_bytes if plan.device is None else plan.device.total_bytes
    if not shown.as_json:
        click.echo(
            f"all {plan.num_experts} experts fit already, in {format_bytes(memory)}: there is nothing to choose; "
            f"give a smaller {'--ram' if plan.device is None else '--vram'} to see what less memory costs"
        )
    return {"model": engine.folder.name, "everything_fits": True, "flags": {}}


def _measure(
    engine: Engine, prompts: list[Any], trace: Trace | None, max_new_tokens: int, *, quiet: bool
) -> tuple[Trace, TokenCosts | None]:
    """A trace, made now unless there is one, and what a token costs, from the same run or a short one."""
    from offmoe.engine.trace_run import encode_all, record_prompts

    if engine.tokenizer is None and prompts == list(PROMPTS):
        prompts = [[(7 * place + 13 * start) % engine.vocab_size for place in range(NUM_IDS)] for start in range(4)]
    given = trace is not None
    ids = encode_all(engine, prompts[:1] if given else prompts)
    with tempfile.TemporaryDirectory(prefix="offmoe-") as folder, ProgressReporter(quiet=quiet) as progress:
        path = Path(folder) / "trace"
        samples = record_prompts(
            engine, ids, path, max_new_tokens=COST_TOKENS if given else max_new_tokens, guesses=False, about={},
            sampling={"seed": 0}, progress=lambda done, total: progress("tokens", done, total),
        )  # fmt: skip
        trace = trace if trace is not None else read_trace(path)
    # With a device, misses that are computed beside its work have no waiting that could be measured like this.
    return trace, None if engine.plan.device is not None else token_costs(samples)


def _say_note(path: Path, trace: Trace) -> None:
    if trace.note is not None:
        click.echo(f"{path}: {trace.note}", err=True)


def _title(trace: Trace, curves: Curves) -> str:
    return (
        f"{trace.header.model}: {curves.num_experts} experts of {format_bytes(curves.slot_bytes)}, "
        f"{curves.num_tokens} decoded tokens"
    )


def _say_choice(curves: Curves, slots: int, costs: TokenCosts | None) -> None:
    point = curves.at(curves.adopted, min(curves.sizes, key=lambda size: abs(size - slots)))
    speed = "" if point.tok_per_s is None else f", {point.tok_per_s:.1f} tok/s"
    if costs is not None:
        click.echo(
            f"costs: {format_seconds(costs.fixed_s)} a token with all experts in memory, "
            f"{format_bandwidth(costs.fetch_bytes_per_s)} of missing experts, {costs.waiting_call_s * 1e3:.2f} ms "
            "a layer call that fetches"
        )
    else:
        click.echo("tok/s is not predicted: " + _WHY_NO_SPEED)
    click.echo(
        f"chosen: {slots} slots, {curves.adopted}: {format_percent(point.hit_rate)} hits{speed}; bound "
        f"{format_percent(curves.at('belady', point.num_slots).hit_rate)}"
    )


_WHY_NO_SPEED = "it needs a run on the CPU in which experts were missing"
