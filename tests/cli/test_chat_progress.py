"""What a person sees while a long prompt is read, in `offmoe chat` and `offmoe generate`: tokens, bytes, time left."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator

import pytest

if sys.platform == "win32":
    pytest.skip("a pseudo-terminal is POSIX", allow_module_level=True)

from terminal import CTRL_C, CTRL_D
from warm_chat import WarmChat, WarmTerminal

READY = r"\x1b\[\?2004h"
BAR = r"\d+ tok"
# Some pieces of one token, and few slots.
PROMPT = "word " * 20
SLOW = ("--prefill-chunk", 1, "--expert-slots", 24, "--prefetch", "off", "--ram", "4GiB", "--max-new-tokens", 4)


@pytest.fixture(scope="module")
def warm() -> Iterator[WarmChat]:
    with WarmChat() as warm:
        yield warm


def rows_of(shown: str) -> list[str]:
    """What a row of the screen held, from one drawing to the next."""
    return [row.strip() for row in re.split(r"[\r\n]+", re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", shown)) if row.strip()]


@pytest.mark.parametrize("columns", [40, 100])
def test_a_prompt_shows_tokens_bytes_and_time(warm: WarmChat, columns: int) -> None:
    args = ["chat", *SLOW, "--no-history", "--system", PROMPT]
    with WarmTerminal(warm, args, columns=columns, said="Yes.", slow_prompt=True) as terminal:
        terminal.expect(READY)
        terminal.send("Hi\r")
        shown = terminal.expect(r"Yes\.")
        drawn = [row for row in rows_of(shown) if re.match(BAR, row)]
        shares = [int(match[1]) for row in drawn if (match := re.search(r"(\d+)%", row))]
        assert len(set(shares)) > 3 and shares == sorted(shares), drawn
        read = [float(match[1]) for row in drawn if (match := re.search(r"([\d.]+) MB read", row))]
        assert read and read == sorted(read) and read[-1] > read[0], drawn
        assert any(re.search(r"ETA \d*:?\d\d:\d\d", row) for row in drawn), drawn
        assert max(map(len, drawn)) <= columns
        assert "\x1b[2K" in shown[shown.rindex("ETA") :], "the bar is gone before the reply stands there"
        terminal.expect(READY)
        terminal.send(CTRL_D)
        assert terminal.wait() == 0


def test_ctrl_c_while_a_prompt_is_read(warm: WarmChat) -> None:
    args = ["chat", *SLOW, "--no-history", "--system", PROMPT]
    with WarmTerminal(warm, args, said="Yes.", slow_prompt=True) as terminal:
        terminal.expect(READY)
        terminal.send("Hi\r")
        terminal.expect("MB read")
        terminal.send(CTRL_C)
        terminal.expect(r"\[stopped\]; nothing was answered: /retry asks it again")
        terminal.expect(READY)
        terminal.send("Hi\r")
        terminal.expect(r"Yes[\s\S]*tok/s")
        terminal.expect(READY)
        terminal.send(CTRL_D)
        assert terminal.wait() == 0
        assert "Traceback" not in terminal.shown


def test_generate_takes_the_bar_down_before_the_text(warm: WarmChat) -> None:
    args = ["generate", *SLOW, "--prompt", PROMPT]
    with WarmTerminal(warm, args, said="Some four words here", pause_ms=30, slow_prompt=True) as terminal:
        before = terminal.expect("Some")
        assert "MB read" in before
        assert "to read" not in terminal.expect("tok/s"), "nothing is drawn between the words"
        assert terminal.wait() == 0
