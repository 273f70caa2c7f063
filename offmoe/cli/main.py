"""The `offmoe` command. torch and transformers are imported by the commands that need them, not here."""

from __future__ import annotations

import click

from offmoe import __version__
from offmoe.cli.checks import bench, verify
from offmoe.cli.facts import inspect, plan, probe
from offmoe.cli.group import OneLineGroup
from offmoe.cli.options import begin_process
from offmoe.cli.replies import chat, demo, generate
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

    MODEL is a Hugging Face model folder or a hub id; without one, the bundled demo model is used.
    """
    begin_process(context)
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


for _command in (generate, chat, serve, demo, inspect, probe, plan, verify, bench, quantize, trace, replay, tune):
    main.add_command(_command)


if __name__ == "__main__":
    main()
