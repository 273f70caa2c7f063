"""Progress, by a clock that the test moves: silence under a second, then lines in a pipe, a bar on a terminal."""

from __future__ import annotations

import io
import re
import time

import pytest
from patience import PATIENCE_S

from offmoe.report.progress import PLAIN_EVERY_S, SHOW_AFTER_S, ProgressReporter


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pipe() -> io.StringIO:
    return io.StringIO()


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()], ids=["pipe", "terminal"])
def test_a_stage_under_a_second_shows_nothing(stream: io.StringIO, clock: Clock) -> None:
    with ProgressReporter(stream=stream, clock=clock) as progress:
        for stage in ("loading", "prefill", "verify"):  # each has a clock of its own
            for done in range(10):
                progress(stage, done, 10)
                clock.now += SHOW_AFTER_S / 10 - 1e-6
    assert stream.getvalue() == ""


def test_a_pipe_gets_a_line_every_few_seconds(pipe: io.StringIO, clock: Clock) -> None:
    with ProgressReporter(stream=pipe, clock=clock) as progress:
        for done in range(25):
            progress("loading", done, 100)
            clock.now += 0.5
    assert PLAIN_EVERY_S == 5.0
    assert pipe.getvalue() == "loading: 10%, 5.0 s, ETA 45.0 s\nloading: 20%, 10.0 s, ETA 40.0 s\n"


def test_nothing_done_yet_has_no_eta(pipe: io.StringIO, clock: Clock) -> None:
    progress = ProgressReporter(stream=pipe, clock=clock)
    progress("prefill", 0, 7)
    clock.now += 75
    progress("prefill", 0, 7)
    assert pipe.getvalue() == "prefill: 0%, 1 min 15 s, ETA unknown\n"


def test_no_work_at_all(pipe: io.StringIO, clock: Clock) -> None:
    progress = ProgressReporter(stream=pipe, clock=clock)
    progress("empty", 0, 0)
    clock.now += 6
    progress("empty", 0, 0)
    assert pipe.getvalue() == "empty: under way, 6.0 s\n"


def test_each_stage_has_its_own_clock(pipe: io.StringIO, clock: Clock) -> None:
    progress = ProgressReporter(stream=pipe, clock=clock)
    for stage in ("loading", "prefill", "loading"):
        progress(stage, 0, 2)
        clock.now += 6
        progress(stage, 1, 2)
    assert pipe.getvalue().splitlines() == [
        f"{stage}: 50%, 6.0 s, ETA 6.0 s" for stage in ("loading", "prefill", "loading")
    ]


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()], ids=["pipe", "terminal"])
def test_quiet_is_quiet(stream: io.StringIO, clock: Clock) -> None:
    with ProgressReporter(quiet=True, stream=stream, clock=clock) as progress:
        for done in range(10):
            progress("loading", done, 10)
            clock.now += 10
    assert stream.getvalue() == ""


def test_a_terminal_gets_a_bar_that_is_taken_down(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    with ProgressReporter(stream=terminal, clock=clock) as progress:
        for done in range(4):
            progress("loading weights", done, 4)
            clock.now += 1
        shown = len(terminal.getvalue())
    assert "loading weights" in terminal.getvalue() and "75%" in terminal.getvalue()
    taken_down = terminal.getvalue()[shown:]
    assert "\x1b[2K" in taken_down and "loading weights" not in taken_down.rsplit("\x1b[2K", 1)[1]


def test_nothing_goes_to_stdout(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressReporter(clock=clock) as progress:
        for done in range(4):
            progress("loading", done, 4)
            clock.now += 6
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("loading: ")


def test_close_may_be_called_at_any_time(clock: Clock) -> None:
    progress = ProgressReporter(stream=Terminal(), clock=clock)
    progress.close()
    progress("loading", 0, 2)
    clock.now += 2
    progress("loading", 1, 2)
    progress.close()
    progress.close()
    assert progress._bar is None


def test_a_terminal_sees_a_stage_that_is_not_heard_of_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("offmoe.report.progress.SHOW_AFTER_S", 0.05)
    terminal = Terminal()
    with ProgressReporter(stream=terminal, detail=lambda: "3 GB read") as progress:
        progress("the first layer", 0, 7)
        deadline = time.monotonic() + PATIENCE_S
        while "3 GB read" not in terminal.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
    assert "the first layer" in terminal.getvalue() and "0%" in terminal.getvalue()


def test_a_stage_that_ended_is_not_shown_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offmoe.report.progress.SHOW_AFTER_S", 0.05)
    terminal = Terminal()
    progress = ProgressReporter(stream=terminal)
    progress("short", 0, 7)
    timer = progress._timer
    assert timer is not None
    progress.close()
    timer.join(PATIENCE_S)
    assert not timer.is_alive() and terminal.getvalue() == ""


@pytest.mark.parametrize("columns", [40, 66, 80])
def test_the_numbers_fit_into_a_narrow_terminal(columns: int, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    terminal = Terminal()
    with ProgressReporter(stream=terminal, clock=clock, detail=lambda: "12.60 GB read") as progress:
        for done in range(4):
            progress("1234 tokens to read", done, 4)
            clock.now += 1
    drawn = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", terminal.getvalue())
    rows = [row for row in re.split(r"[\r\n]+", drawn) if row.strip()]
    assert rows and all(len(row) <= columns for row in rows)
    assert any("1234 tok" in row and "75%" in row and "12.60 GB read" in row and "ETA" in row for row in rows), rows
