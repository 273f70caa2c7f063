"""scripts/bench: one command, sub-commands with options, and JSON in the last line of output."""

from __future__ import annotations

import json
import sys

import pytest
from benchlib import command_line
from benchlib.commands import products

from offmoe.kernels.cpu.loader import usable_levels


@pytest.fixture(autouse=True)
def own_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", list(sys.argv))


@pytest.mark.parametrize("name", command_line.command_names())
def test_every_command_tells_its_options(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command_line.main([name, "--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0 and said.startswith(f"usage: scripts/bench {name} ")
    assert command_line.summary_of(name).split()[0] in said


def test_what_there_is_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main([]) == 0
    assert set(command_line.command_names()) <= set(capsys.readouterr().out.split())
    assert command_line.main(["speed"]) == 2
    assert capsys.readouterr().err.startswith("error: 'speed' is no command; known: attention, ")


@pytest.mark.skipif(not usable_levels(), reason="no CPU kernels here")
def test_the_last_line_is_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(products, "SIZES", ((64, 32),))
    monkeypatch.setattr(products, "ROWS", (1, 8))
    assert command_line.main(["products"]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(row["outputs"], row["inputs"], row["rows"]) for row in record] == [(64, 32, 1), (64, 32, 8)]
    assert all(len(row["gflops"]) == 3 and min(row["gflops"]) > 0 for row in record)
