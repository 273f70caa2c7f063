"""Users without a home, unknown to the system, or with folders that cannot be written."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from commands import fail, invoke, succeed
from engines import PROMPT, open_tiny, save_tiny
from logs import logs_warning

from offmoe.cache.warm_start import WarmStart
from offmoe.core.folders import NO_HOME, cache_folder, config_folder, expand, home_folder
from offmoe.machine import reservations
from offmoe.machine.record import read_record, record_path

pwd = pytest.importorskip("pwd", reason="users of Windows always have a home")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model")


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of a container's user that no file knows, and no HOME."""

    def unknown(number: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_STATE_HOME", "OFFMOE_CACHE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("nobody")
def test_folders_of_nobody() -> None:
    assert home_folder() == NO_HOME
    assert config_folder() == NO_HOME / ".config/offmoe"
    assert cache_folder() == NO_HOME / ".cache/offmoe"
    assert [expand(name) for name in ("~", "~/a/b", "~who/a", "a/~")] == [
        NO_HOME, NO_HOME / "a/b", Path("~who/a"), Path("a/~"),
    ]  # fmt: skip


def test_one_variable_moves_all_that_is_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    before = WarmStart("hash", [1]).path, record_path()
    monkeypatch.setenv("OFFMOE_CACHE", str(tmp_path / "own"))
    after = WarmStart("hash", [1]).path, record_path()
    assert {path.is_relative_to(tmp_path / "xdg" / "offmoe") for path in before} == {True}
    assert {path.is_relative_to(tmp_path / "own") for path in after} == {True}


def test_a_name_that_begins_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert (expand("~/x"), expand("~no-such-user/x")) == (tmp_path / "x", Path("~no-such-user/x"))
    assert fail("inspect", "~no-such-user").startswith("~no-such-user does not exist")


@pytest.mark.usefixtures("nobody")
def test_nobody_plans_and_generates(model: Path) -> None:
    assert "experts in RAM" in succeed("plan", model).stdout
    assert read_record() is None
    with open_tiny(model, warm_start=False) as engine:
        assert len(engine.generate(PROMPT, max_new_tokens=3).token_ids) == 3


@pytest.mark.usefixtures("nobody")
def test_counts_of_nobody_are_not_kept_and_that_is_said(model: Path) -> None:
    with logs_warning(r"cannot be written \(Not a directory\); use --no-warm-start"):  # noqa: SIM117
        with open_tiny(model, warm_start=True) as engine:
            engine.generate(PROMPT, max_new_tokens=3)


def test_a_system_on_which_nothing_can_be_written(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No folder for temporary files, a cache folder that refuses."""

    def nowhere() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    monkeypatch.delenv(reservations.FOLDER_VARIABLE, raising=False)
    for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "OFFMOE_CACHE"):
        monkeypatch.setenv(name, "/proc/nowhere")
    assert reservations.run_folder() == Path(os.devnull) / "offmoe"
    with logs_warning("cannot be written"), open_tiny(model, warm_start=True) as engine:
        assert len(engine.generate(PROMPT, max_new_tokens=3).token_ids) == 3
    assert invoke("inspect", model).exit_code == 0
