"""The `offmoe` command. torch and transformers are imported by the commands that need them, not here."""

from __future__ import annotations

import click

from offmoe import __version__
from offmoe.cli.checks import bench, verify
from offmoe.cli.facts import inspect, plan, probe
from offmoe.cli.group import OneLineGroup
from offmoe.cli.models import list_models, pull, rm
from offmoe.cli.options import begin_process
from offmoe.cli.replies import chat, demo, generate, run
from offmoe.cli.routing import replay, trace, tune
from offmoe.cli.serve import serve
from offmoe.cli.smaller import quantize


@click.group(
    cls=OneLineGroup,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__, prog_name="offmoe")
@click.pass_context
def main(context: click.Context) -> None:
    """Run Mixture-of-Experts language models larger than memory, exactly as published.

    MODEL is a Hugging Face model folder, a GGUF file, a hub id or a link of the hub; without one, most commands use the
    bundled demo model.
    """
    begin_process(context)
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


for _command in (
    run, chat, generate, serve, demo, list_models, pull, rm, inspect, probe, plan, verify, bench, quantize, trace,
    replay, tune,
):  # fmt: skip
    main.add_command(_command)
main.add_command(inspect, "show")


if __name__ == "__main__":
    main()
