"""What stands at the place of an output, and files to read that never end."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest
from commands import fail, last_json, succeed
from engines import PROMPT, open_tiny, save_tiny

from offmoe.chat.messages import Message
from offmoe.chat.saved import read_messages, save_messages
from offmoe.core.errors import OutputError, UsageError
from offmoe.core.files import PendingFile, check_output, read_bounded, write_whole
from offmoe.core.saved_flags import read_flags, write_flags
from offmoe.trace.reader import read_trace

LETTER = b"Dear Anna, this is not a trace.\n"
RAM = ("--ram", "4GiB", "--expert-slots", 4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("files"))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    (tmp_path / "prompts").write_text("[1, 2, 3]\n")
    return tmp_path / "prompts"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_whole_or_as_before(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"before")
    path.chmod(0o640)
    pending = PendingFile(path)
    pending.file.write(b"af")
    pending.file.flush()
    assert path.read_bytes() == b"before"
    pending.discard()
    assert (path.read_bytes(), names(tmp_path)) == (b"before", ["a"])
    write_whole(path, b"after")
    assert (path.read_bytes(), names(tmp_path)) == (b"after", ["a"])
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_links_stay_links(tmp_path: Path) -> None:
    """To a file of another folder, by way of another link, and to one that is not there yet."""
    (tmp_path / "dotfiles").mkdir()
    real = tmp_path / "dotfiles/real"
    real.write_bytes(b"before")
    (tmp_path / "one").symlink_to("two")
    (tmp_path / "two").symlink_to(real)
    (tmp_path / "new").symlink_to("dotfiles/new")
    write_whole(tmp_path / "one", b"after")
    write_whole(tmp_path / "new", b"made")
    assert (real.read_bytes(), (tmp_path / "dotfiles/new").read_bytes()) == (b"after", b"made")
    assert all((tmp_path / name).is_symlink() for name in ("one", "two", "new"))
    assert names(tmp_path / "dotfiles") == ["new", "real"]


def test_settings_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "models.json")
    write_flags(tmp_path / "link", "1", "a", {"policy": "lru"})
    write_flags(tmp_path / "link", "2", "b", {"policy": "lfru"})
    assert (tmp_path / "link").is_symlink()
    found = read_flags(tmp_path / "models.json", "1", {})
    assert found is not None and found.flags == {"policy": "lru"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no such devices here")
def test_devices_stay_devices(tmp_path: Path) -> None:
    write_whole(Path("/dev/null"), b"gone")
    with pytest.raises(OSError, match="No space left"):
        write_whole(Path("/dev/full"), b"gone")
    for name in ("/dev/null", "/dev/full"):
        assert stat.S_ISCHR(Path(name).stat().st_mode)
    (tmp_path / "link").symlink_to("/dev/null")
    write_whole(tmp_path / "link", b"gone")
    assert (tmp_path / "link").is_symlink() and names(tmp_path) == ["link"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_gets_the_bytes(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    write_whole(tmp_path / "pipe", b"through")
    reader.join()
    assert read == [b"through"] and stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_what_may_be_replaced(tmp_path: Path) -> None:
    letter, empty = tmp_path / "letter", tmp_path / "empty"
    letter.write_bytes(LETTER)
    empty.touch()
    for path in (empty, tmp_path / "none"):
        check_output(path, "a trace", lambda path: False)
    check_output(letter, "a trace", lambda path: True)
    check_output(letter, "a trace", lambda path: False, overwrite=True)
    with pytest.raises(UsageError, match="letter exists and is no trace; choose another name"):
        check_output(letter, "a trace", lambda path: False)
    with pytest.raises(OutputError, match="it is a folder"):
        check_output(tmp_path, "a trace", lambda path: True, overwrite=True)


def test_a_trace_replaces_traces_only(model: Path, tmp_path: Path) -> None:
    letter, link, beside = tmp_path / "letter", tmp_path / "link", tmp_path / "b.partial"
    letter.write_bytes(LETTER)
    beside.write_bytes(LETTER)
    link.symlink_to("real")
    with open_tiny(model) as engine:

        def record(name: str, **options: bool) -> None:
            with engine.trace(tmp_path / name, **options):
                engine.generate(PROMPT, max_new_tokens=3)

        for name in ("letter", "b"):
            with pytest.raises(UsageError, match="exists and is no trace; choose another name"):
                record(name)
        assert letter.read_bytes() == beside.read_bytes() == LETTER
        for _ in range(2):
            record("link")
        assert link.is_symlink() and read_trace(tmp_path / "real").num_decoded == 2
        record("letter", overwrite=True)
        assert read_trace(letter).num_decoded == 2
    assert names(tmp_path) == ["b.partial", "letter", "link", "real"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no such devices here")
def test_the_trace_command(model: Path, prompts: Path, tmp_path: Path) -> None:
    letter = tmp_path / "letter"
    letter.write_bytes(LETTER)
    args = ("trace", model, "--prompts", prompts, "--max-new-tokens", 2, *RAM)
    assert "exists and is no trace; choose another name" in fail(*args, "-o", letter)
    assert letter.read_bytes() == LETTER
    succeed(*args, "-o", letter, "--force")
    assert read_trace(letter).num_decoded == 1
    assert last_json(succeed(*args, "-o", "/dev/null", "--json").stdout)["prompts"] == 1
    result = fail_late(*args, "-o", "/dev/full")
    assert "the trace /dev/full cannot be written: No space left on device" in result
    assert stat.S_ISCHR(Path("/dev/full").stat().st_mode)


def fail_late(*args: object) -> str:
    """A failure after the model was loaded, which is said before."""
    from commands import invoke

    result = invoke(*args)
    assert result.exit_code == 2
    return result.stderr.splitlines()[-1]


def test_a_plot_replaces_plots_only(model: Path, prompts: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    trace = tmp_path / "t"
    with open_tiny(model) as engine, engine.trace(trace):
        engine.generate(PROMPT, max_new_tokens=4)
    for kind in ("png", "svg"):
        photo, plot = tmp_path / f"photo.{kind}", tmp_path / f"plot.{kind}"
        photo.write_bytes(LETTER)
        assert "exists and is no plot of offmoe's" in fail("replay", trace, "--plot", photo)
        assert photo.read_bytes() == LETTER
        for _ in range(2):
            succeed("replay", trace, "--plot", plot)
        succeed("replay", trace, "--plot", photo, "--force")
        assert LETTER not in photo.read_bytes()


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no such device here")
def test_files_that_never_end(model: Path, prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--ids /dev/zero has more than 1 MiB; it cannot be what is asked for"):
        read_bounded(Path("/dev/zero"), "--ids", 1 << 20)
    with pytest.raises(UsageError, match="no saved conversation: it is no regular file"):
        read_messages(Path("/dev/zero"))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="no regular file"):
        read_messages(tmp_path / "pipe")
    with pytest.raises(UsageError, match="--config /dev/zero has more than 16 MiB"):
        read_flags(Path("/dev/zero"), "1", {})
    assert "--prompts /dev/zero has more than 64 MiB" in fail("tune", model, "--prompts", "/dev/zero")


def test_a_conversation_behind_a_link_and_into_a_device(tmp_path: Path) -> None:
    messages: list[Message] = [{"role": "user", "content": "hi"}]
    (tmp_path / "link").symlink_to("chat.json")
    for _ in range(2):
        save_messages(tmp_path / "link", messages, model="m")
    assert (tmp_path / "link").is_symlink() and read_messages(tmp_path / "chat.json") == messages
    if Path("/dev/full").exists():
        with pytest.raises(OutputError, match="/dev/full cannot be written: No space left on device"):
            save_messages(Path("/dev/full"), messages, model="m")
