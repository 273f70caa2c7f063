"""The public signatures: an option has one name, one type and one default in Python, config and command line."""

from __future__ import annotations

import inspect
import os
import pydoc
import subprocess
import sys
import typing
from dataclasses import fields
from pathlib import Path
from typing import Literal, get_args, get_origin

import click
import pytest
from commands import environment
from engines import save_tiny

import offmoe
from offmoe.cli.main import main
from offmoe.core import config, errors
from offmoe.core.config import OPTION_NAMES, EngineConfig

LOAD = dict(inspect.signature(offmoe.load).parameters)
# Not settings of an engine: which model, with whose rights, who is told; and the former name of `expert_slots`.
BESIDE = ("model", "token", "progress", "tell", "experts")
WIDER = (config.Size | None, config.Count | None)  # "6GiB" and "auto" become a number, or None


def test_load_has_the_fields_of_the_config_with_their_types_and_defaults() -> None:
    kinds = {parameter.kind for name, parameter in LOAD.items() if name != "model"}
    assert kinds == {inspect.Parameter.KEYWORD_ONLY} and not any(name.startswith("_") for name in LOAD)
    assert [name for name in LOAD if name not in BESIDE] == list(OPTION_NAMES)
    types = typing.get_type_hints(EngineConfig)
    for field in fields(EngineConfig):
        assert LOAD[field.name].default == field.default, field.name
        given, stored = eval(LOAD[field.name].annotation, vars(config)), types[field.name]
        is_folder = given == str | os.PathLike[str] | None and stored == str | None
        assert given == stored or is_folder or (given in WIDER and stored == int | None), field.name


@pytest.mark.parametrize("command", ["generate", "chat", "plan", "bench", "verify", "trace", "tune"])
def test_commands_have_a_flag_for_every_option_and_leave_defaults_to_the_config(command: str) -> None:
    flags = {param.name: param for param in main.commands[command].params if isinstance(param, click.Option)}
    assert list(OPTION_NAMES) == [name for name in flags if name in OPTION_NAMES]
    types = typing.get_type_hints(EngineConfig)
    for name in OPTION_NAMES:
        flag = flags[name]
        assert f"--{name.replace('_', '-')}" in flag.opts and not flag.required and flag.help
        assert not isinstance(flag.default, (str, int)), "what was not given comes from the config"
        if get_origin(types[name]) is Literal and name != "prefetch":
            assert flag.metavar == "|".join(get_args(types[name]))


def test_help_has_a_line_for_every_option() -> None:
    text = pydoc.plain(pydoc.render_doc(offmoe.load))
    assert "options" not in LOAD and "Any" not in text.splitlines()[2]
    for name, parameter in LOAD.items():
        (line,) = [line for line in text.splitlines() if line.strip().startswith(f"{name}  ")]
        assert len(line.strip()) > len(name) + 20, line
        if isinstance(parameter.default, (str, bool)):
            shown = f'"{parameter.default}"' if isinstance(parameter.default, str) else str(parameter.default)
            assert shown in line, line


def test_a_wrong_name_is_refused_by_python_itself() -> None:
    with pytest.raises(TypeError, match="polcy"):
        offmoe.load(polcy="lru")  # type: ignore[call-arg]


def test_every_error_is_exported_and_in_the_tree() -> None:
    tree = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type)}
    assert len(tree) > 15
    for name, kind in tree.items():
        assert issubclass(kind, errors.OffmoeError) and getattr(offmoe, name) is kind
        assert name in offmoe.__all__ and name in str(errors.__doc__)


def test_everything_that_is_exported_is_there() -> None:
    for name in offmoe.__all__:
        assert getattr(offmoe, name) is not None and name in dir(offmoe)
    with pytest.raises(AttributeError, match="'offmoe' has no attribute 'laod'"):
        offmoe.laod  # type: ignore[attr-defined] # noqa: B018


PROGRAM = """
import logging, sys, offmoe
if len(sys.argv) > 2:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s")
with offmoe.load(sys.argv[1], ram="4GiB", expert_slots=4) as engine:
    engine.generate([3, 4, 5], max_new_tokens=2)
"""


def test_a_program_sees_warnings_on_standard_error_and_nothing_else(tmp_path: Path) -> None:
    """By Python's own handler of last resort; one that configures logging sees records of the logger offmoe."""
    folder = save_tiny(tmp_path / "tiny")
    (tmp_path / "file").write_text("where the cache folder should be")
    command = [sys.executable, "-c", PROGRAM, str(folder)]
    shown = {}
    for name, more in (("plain", []), ("configured", ["info"])):
        done = subprocess.run(
            [*command, *more], capture_output=True, text=True, check=True,
            env=environment(XDG_CACHE_HOME=str(tmp_path / "file")),
        )  # fmt: skip
        assert done.stdout == ""
        shown[name] = done.stderr
    (line,) = shown["plain"].splitlines()
    assert line.startswith("counts of earlier runs are not used: ") and "--no-warm-start" in line
    assert "WARNING offmoe.cache.warm_start" in shown["configured"].splitlines()
