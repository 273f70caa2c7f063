"""Markdown as rows of a terminal, also while it is still being written. Rich and markdown-it do the work.

Differs from rich's own look where a chat asks for it: a line break in a paragraph stays one, headings stand on the
left, code can be copied (no frame, no background, no padding; a long line stays one, which the terminal wraps), and
HTML is shown as text, not dropped.
"""

from __future__ import annotations

import io
import re
from typing import Any, ClassVar

from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import CodeBlock, Heading, Markdown, MarkdownElement
from rich.style import Style
from rich.syntax import Syntax
from rich.text import Text
from rich.theme import Theme

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_TRAILING_SPACE = re.compile(r"[ \t]+(?=(?:\x1b\[[0-9;]*m)*$)")
_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})")
# A last line that is no more than a mark: a list item, heading, rule or table that is about to begin.
_BARE_MARK = re.compile(r"^\s*(?:[-=*+_#>`~|]+|\d{1,9}[.)]?)\s*$")
_CODE_SPAN = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)", re.DOTALL)


_ASIDE = Style(dim=True, italic=True)
_THEME = Theme({"markdown.code": "cyan"})  # rich's has a background, which light terminals show as a black box


class _LeftHeading(Heading):
    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        text = self.text.copy()
        text.stylize("bold")
        yield text


class _PlainCode(CodeBlock):
    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        rule = Style(dim=True)
        name = "" if self.lexer_name == "text" else f" {self.lexer_name}"
        yield Text(f"──{name}", style=rule, overflow="ellipsis", no_wrap=True)
        code = str(self.text).rstrip()
        if code:
            lines = Syntax(code, self.lexer_name, theme="ansi_dark", background_color="default").highlight(code)
            lines.rstrip()
            lines.no_wrap, lines.overflow = True, "ignore"
            yield lines
        yield Text("──", style=rule)


class _ChatMarkdown(Markdown):
    elements: ClassVar[dict[str, type[MarkdownElement]]] = {
        **Markdown.elements, "heading_open": _LeftHeading, "fence": _PlainCode, "code_block": _PlainCode,
    }  # fmt: skip

    def __init__(self, text: str) -> None:
        super().__init__("", hyperlinks=False)
        self.markup = text
        self.parsed = _parse(text)


class RowRenderer:
    """Rows, with their styles as escape sequences, for one width."""

    def __init__(self, width: int, *, color_system: str | None, no_color: bool) -> None:
        self.width = max(8, width)
        self.bar = "\x1b[2m│\x1b[0m"
        self._options: dict[str, Any] = {
            "theme": _THEME, "force_terminal": True, "legacy_windows": False, "color_system": color_system,
            "no_color": no_color,
        }  # fmt: skip

    def markdown(self, text: str) -> list[str]:
        """Rows of whole blocks."""
        return self._rows(_ChatMarkdown(printable(text)))

    def aside(self, text: str) -> list[str]:
        """Rows of plain text, dimmed behind a bar, wrapped at words."""
        rows = self._rows(Text(printable(text).strip("\n"), style=_ASIDE), margin=2)
        return [f"{self.bar} {row}" if row else self.bar for row in rows]

    def _rows(self, what: Any, *, margin: int = 0) -> list[str]:
        file = io.StringIO()
        Console(file=file, width=self.width - margin, **self._options).print(what, crop=False)
        rows = [_TRAILING_SPACE.sub("", row) for row in file.getvalue().split("\n")]
        filled = [i for i, row in enumerate(rows) if plain(row)]
        return rows[filled[0] : filled[-1] + 1] if filled else []


def plain(row: str) -> str:
    """A row without its styles."""
    return re.sub(r"\x1b\[[0-9;]*m", "", row)


def printable(text: str) -> str:
    """Without what could steer the terminal: a model may write anything."""
    return _CONTROL.sub("", text)


def finished_length(text: str) -> int:
    """Characters of `text` that are whole blocks whatever follows: all but the last block.

    What the last line is, is not known before it ends: "#" is a heading, "#1" belongs to the paragraph above.
    """
    lines_end = text.rfind("\n") + 1
    ends = {_last_block(text), _last_block(text if lines_end == len(text) else text[:lines_end] + "x")}
    return min(ends)


def _last_block(text: str) -> int:
    """Offset of the last block."""
    blocks = [token.map for token in _parse(text) if token.level == 0 and token.nesting >= 0 and token.map]
    if len(blocks) < 2:
        return 0
    lines = text.splitlines(keepends=True)
    return sum(map(len, lines[: blocks[-1][0]]))


def mended(text: str) -> str:
    """The last block, as it will probably look: open emphasis is closed, marks that only begin something are hidden."""
    lines = text.split("\n")
    opened = _FENCE.match(lines[0])
    if opened:  # a fence that is not closed goes to the end; only its half-written end is no code
        mark = opened[1]
        if (
            len(lines) > 1
            and lines[-1].strip()
            and set(lines[-1].strip()) == {mark[0]}
            and len(lines[-1].strip()) < len(mark)
        ):
            lines.pop()
        return "\n".join(lines)
    if _BARE_MARK.match(lines[-1]):
        lines.pop()
    text = "\n".join(lines)
    outside = _CODE_SPAN.sub("", text)
    if "`" in outside:
        return text.rstrip("`") if text.endswith("`") else text + "`" * len(re.findall(r"`+", outside)[-1])
    if outside.count("**") % 2:
        return text.rstrip("*") if text.endswith("**") else text.rstrip() + "**"
    return text


def _parse(text: str) -> list[Token]:
    parser = MarkdownIt("commonmark", {"html": False}).enable("strikethrough").enable("table")
    tokens = parser.parse(text)
    for token in tokens:
        for child in token.children or ():
            if child.type == "softbreak":
                child.type = "hardbreak"
    return tokens
