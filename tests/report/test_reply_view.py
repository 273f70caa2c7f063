"""A reply on the screen while it comes: formatted at every moment, whole in the end, in any terminal."""

from __future__ import annotations

import io
import itertools
import random
import re
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from screen import Screen

from offmoe.report.markdown_rows import RowRenderer, finished_length, mended, plain, printable
from offmoe.report.reply_view import MarkdownView, TextView, make_view

REPLY = """# Reading a file

Use **`open`** in a `with` block, so that the file is *closed* even when an error is raised.

```python
def read_lines(path: str) -> list[str]:
    return open(path).read().split()  # a comment that reaches beyond the edge of narrow terminals
```

1. First, it is **short**.
2. Second, a nested list:
   - one
   - two `x = 1`

| name | value |
|---|---|
| a | 1 |

> A quote with <html> in it.

Line one
line two

That is all.
"""


def whole(text: str, columns: int) -> str:
    """The reply as it should stand in the end."""
    rows = RowRenderer(columns - 1, color_system=None, no_color=True).markdown(text)
    texts = [plain(row) for row in rows]
    parts = (text[begin : begin + columns] for text in texts for begin in range(0, max(1, len(text)), columns))
    return without_gaps("\n".join(part.rstrip() for part in parts))


def without_gaps(text: str) -> str:
    """Rich leaves two rows free before a table."""
    return re.sub("\n{3,}", "\n\n", text)


def view_of(screen: Screen, **options: Any) -> MarkdownView:
    ticks = (number // 2 for number in itertools.count())  # drawing takes no time, and is always due
    return MarkdownView(
        cast("Any", screen), **{"color": True, "clock": lambda: float(next(ticks)), "size": screen.size, **options}
    )


@pytest.mark.parametrize("columns", [20, 40, 80])
@pytest.mark.parametrize("height", [4, 50])
@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_pieces_add_up_to_the_whole(columns: int, height: int, size: int) -> None:
    screen = Screen(columns, height)
    view = view_of(screen)
    for begin in range(0, len(REPLY), size):
        view.add(REPLY[begin : begin + size])
    view.end()
    shown, expected = without_gaps(screen.text), whole(REPLY, columns)
    if height == 50:
        assert shown == expected
    else:  # what scrolled out cannot be mended, but no word of it is lost, and the last rows are as they should be
        assert shown.split("\n")[-3:] == expected.split("\n")[-3:]
        assert {"Reading", "quote"} <= set(shown.split()) and "read_lines(path:" in shown.replace("\n", "")


def test_markdown_is_formatted_while_it_is_incomplete() -> None:
    screen = Screen(60, 24)
    view = view_of(screen)
    for typed, seen in [
        ("It is **bo", "It is bo"), ("ld** and `co", "It is bold and co"), ("de`.\n\n-", "It is bold and code."),
        (" one", "It is bold and code.\n\n • one"), ("\n\n```py", "It is bold and code.\n\n • one\n\n── py\n──"),
        ("\nx = 1\n``", "It is bold and code.\n\n • one\n\n── py\nx = 1\n──"),
        ("`\n\n#", "It is bold and code.\n\n • one\n\n── py\nx = 1\n──"),
        ("# Title", "It is bold and code.\n\n • one\n\n── py\nx = 1\n──\n\nTitle"),
    ]:  # fmt: skip
        view.add(typed)
        assert screen.text == seen


def test_only_what_changes_is_written() -> None:
    """Nothing is cleared before it is drawn: no flicker."""
    screen, writes = Screen(60, 24), list[str]()
    write = screen.write
    screen.write = lambda text: (writes.append(text), write(text))[1]  # type: ignore[method-assign]
    view = view_of(screen)
    view.add("One.\n\nTwo is here.\n\nThree")
    writes.clear()
    view.add(" more")
    assert len(writes) == 1 and "Two" not in writes[0] and "Three more" in writes[0]
    assert writes[0].index("Three more") < writes[0].index("\x1b[K") < writes[0].index("\x1b[J")


def test_reasoning_stands_behind_a_bar() -> None:
    screen = Screen(40, 24)
    view = view_of(screen)
    for text, reasoning in [("Let me", True), (" think.\n\nTwice.", True), ("**Yes.**", False)]:
        view.add(text, reasoning=reasoning)
    view.end()
    assert screen.text == "│ Let me think.\n│\n│ Twice.\n\nYes."


def test_the_terminal_is_made_narrower_and_wider() -> None:
    """No word is lost; some may be shown twice."""
    words = " ".join(f"({i})" for i in range(200))
    for seed in range(20):
        order = random.Random(seed)
        screen = Screen(80, 10)
        view = view_of(screen)
        for begin in range(0, len(words), 40):
            view.add(words[begin : begin + 40])
            if order.random() < 0.3:
                screen.resize(order.randrange(15, 90))
        view.end()
        shown = "".join(screen.text.split())
        missing = [word for word in words.split() if word not in shown]
        assert not missing, f"{seed=} {missing=}"


@settings(max_examples=60)
@given(st.text(alphabet="ab *`_#-1.>|~\n[](<&\\:", max_size=60), st.integers(1, 9))
def test_any_text_in_any_pieces(text: str, size: int) -> None:
    """The view never fails, never leaves the screen, and ends with what a whole rendering of its blocks gives."""
    screen = Screen(30, 100)
    view = view_of(screen)
    for begin in range(0, len(text), size):
        view.add(text[begin : begin + size])
    view.end()
    other = Screen(30, 100)
    at_once = view_of(other)
    at_once.add(text)
    at_once.end()
    assert screen.text.split() == other.text.split()


def test_whole_blocks_are_finished() -> None:
    assert finished_length("One.\n\nTwo") == len("One.\n\n")
    assert finished_length("- a\n\n- b") == 0, "one list"
    assert finished_length("```\na\n\nb") == 0, "an open fence"
    assert finished_length("") == finished_length("One") == 0


def test_mended() -> None:
    assert mended("a **b") == "a **b**"
    assert mended("a **") == "a "
    assert mended("a `b **c") == "a `b **c`"
    assert mended("a\n-") == "a", "else the line above were a heading for a moment"
    assert mended("whole **b** `c`") == "whole **b** `c`"


def test_escape_sequences_of_the_model_do_not_reach_the_terminal() -> None:
    assert printable("a\x1b[2Jb\x07\x9b1mc\td\n") == "a[2Jb1mc\td\n"
    screen = Screen()
    view = view_of(screen)
    view.add("a\x1b]0;title\x07b\r\x08c")
    view.end()
    assert screen.text == "a]0;titlebc"


def test_no_color_keeps_bold() -> None:
    rows = RowRenderer(60, color_system="standard", no_color=True).markdown("**b** `c`\n\n```python\ndef f(): 1\n```")
    codes = {code for row in rows for code in row.split("\x1b[")[1:]}
    assert any(code.startswith("1m") for code in codes)
    assert not any(code.startswith(("3", "9", "4")) for code in codes), f"{codes=}"


class _Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_text_as_it_is() -> None:
    out, err = io.StringIO(), io.StringIO()
    view = TextView(out, err)
    view.add("Hm\x1b.", reasoning=True)
    view.add("**Yes**\x1b", reasoning=False)
    view.end()
    assert (out.getvalue(), err.getvalue()) == ("**Yes**\x1b\n", "[thinking] Hm\x1b.\n")
    terminal = _Tty()
    view = TextView(terminal)
    view.add("Hm.", reasoning=True)
    view.add("**Yes**\x1b[2J")
    view.end()
    assert terminal.getvalue() == "[thinking] Hm.\n[answer] **Yes**[2J\n"


@pytest.mark.parametrize(("term", "markdown", "kind"), [("xterm", True, MarkdownView), ("dumb", True, TextView),
                                                        ("xterm", False, TextView)])  # fmt: skip
def test_the_view_fits_the_terminal(
    term: str, markdown: bool, kind: type[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr("sys.stdout", _Tty())
    assert isinstance(make_view(markdown=markdown, color=True), kind)
    monkeypatch.setattr("sys.stdout", io.StringIO())
    assert isinstance(make_view(markdown=markdown, color=True), TextView)
