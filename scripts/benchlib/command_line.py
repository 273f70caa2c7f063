"""`scripts/bench`: finds its sub-commands, and makes a parser alike for each.

    scripts/bench                    # what there is to measure
    scripts/bench systems --help

The last line that a sub-command writes to standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import sys
from pathlib import Path

COMMANDS = Path(__file__).parent / "commands"


def make_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the module's docstring: its first paragraph before the options, the rest after them."""
    summary, _, rest = (doc or "").partition("\n\n")
    return argparse.ArgumentParser(
        prog=f"scripts/bench {sys.argv[0]}", description=summary, epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip


def command_names() -> list[str]:
    """The sub-commands by name."""
    return sorted(path.stem.replace("_", "-") for path in COMMANDS.glob("[a-z]*.py"))


def summary_of(name: str) -> str:
    """The first sentence of a sub-command's docstring. Nothing is imported."""
    text = (COMMANDS / f"{name.replace('-', '_')}.py").read_text(encoding="utf-8")
    return " ".join((ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0].split())


def main(argv: list[str] | None = None) -> int:
    """Run the sub-command that `argv` names; returns its exit code."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in {"-h", "--help"}:
        width = max(map(len, command_names()))
        print("usage: scripts/bench COMMAND [OPTIONS]; COMMAND --help tells its options\n")
        print("\n".join(f"{known:<{width}}  {summary_of(known)}" for known in command_names()))
        return 0
    if name not in command_names():
        print(f"error: {name!r} is no command; known: {', '.join(command_names())}", file=sys.stderr)
        return 2
    sys.argv[:] = [name, *rest]
    return importlib.import_module(f"benchlib.commands.{name.replace('-', '_')}").main(rest) or 0


if __name__ == "__main__":
    sys.exit(main())
