"""README and docs name what is there: files, headings, flags, messages, code."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest
from places import ROOT

from offmoe.cli.main import main

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
IDS = [page.name for page in PAGES]
WITH_LINKS = [*PAGES, *sorted((ROOT / "benchmarks").glob("*.md"))]
# Flags that are not offmoe's own.
FOREIGN_FLAGS = {"--out", "--rounds"} | {
    "--served-model-name", "--max-model-len", "--tensor-parallel-size", "--enable-auto-tool-choice",
    "--tool-call-parser", "--reasoning-parser", "--model-path", "--tp", "--publish", "--volume", "--secret", "--tag",
    "--requests", "--connections", "--memory", "--no-install-recommends", "--create-home", "--user", "--no-cache-dir",
}  # fmt: skip
NAMED_FILE = re.compile(r"`((?:[\w.-]+/)*[\w-]+\.(?:py|md|h|cpp|toml))\b")


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """The headings as GitHub turns them into anchors."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", WITH_LINKS, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", text_of(page))
    for link in links:
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_measurements_that_are_named_exist() -> None:
    named = [*WITH_LINKS, ROOT / "CHANGELOG.md", *(ROOT / "offmoe").rglob("*.py")]
    found = {name for path in named for name in re.findall(r"\b20\d\d-\d\d-\d\d-[\w-]+\.md", text_of(path))}
    there = {path.name for path in (ROOT / "benchmarks").iterdir()}
    assert len(found) > 20
    assert found <= there, sorted(found - there)


def test_file_names_are_found() -> None:
    assert "tests/planner/test_plan.py" in NAMED_FILE.findall(text_of(ROOT / "README.md"))


def test_every_page_is_linked_from_the_readme() -> None:
    linked = re.findall(r"\]\((docs/[^)#\s]+)", text_of(ROOT / "README.md"))
    assert {f"docs/{path.name}" for path in (ROOT / "docs").iterdir()} <= set(linked)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_files_that_are_named_exist(page: Path) -> None:
    for name in NAMED_FILE.findall(text_of(page)):
        places = [ROOT / name, ROOT / "offmoe" / name]
        rooms = (ROOT / "offmoe", ROOT / "tests")
        found = any(path.exists() for path in places) or any(any(room.rglob(name)) for room in rooms)
        assert found, name


def test_promises_have_tests() -> None:
    """Each row of tests/PROMISES.md names a test file, and a test in it, that are there."""
    rows = [row for row in text_of(ROOT / "tests" / "PROMISES.md").splitlines() if row.startswith("| ")][1:]
    assert len(rows) > 20
    for row in rows:
        named = re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?`", row)
        assert named, row
        for file, test in named:
            [path] = (ROOT / "tests").rglob(file)
            text = text_of(path)
            assert not test or re.search(rf"^def {test}\(", text, re.MULTILINE), f"{file}::{test}"


def test_quick_tests_are_there() -> None:
    named = (ROOT / "tests" / "quick.txt").read_text(encoding="utf-8").split()
    assert len(named) > 15
    for name in named:
        file, _, test = name.partition("::")
        assert not test or f"def {test.partition('[')[0]}(" in text_of(ROOT / file), name


@cache
def known_flags() -> set[str]:
    flags = {flag for command in main.commands.values() for param in command.params for flag in param.opts}
    flags |= {flag for command in main.commands.values() for param in command.params for flag in param.secondary_opts}
    return flags | {"--help", "--version"}


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_flags_and_commands_that_are_named_exist(page: Path) -> None:
    lines = [line for line in text_of(page).splitlines() if "scripts/" not in line and "pip install" not in line]
    for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", "\n".join(lines)):
        assert flag in known_flags() | FOREIGN_FLAGS, flag
    code = [
        *re.findall(r"`(offmoe [^`]*)`", text_of(page)),
        *re.findall(r"^    (offmoe .*)", text_of(page), re.MULTILINE),
    ]
    code += [line for block in re.findall(r"```sh\n(.*?)```", text_of(page), re.DOTALL) for line in block.splitlines()]
    for command in re.findall(r"^offmoe ([a-z]+)\b", "\n".join(code), re.MULTILINE):
        assert command in main.commands, command


@cache
def strings_of_the_code() -> list[str]:
    """Every string, with a zero byte where a value is put in."""
    found: list[str] = []
    for path in (ROOT / "offmoe").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def is_said(message: str) -> bool:
    """One string of the code has the message's pieces, which `...` separates, in their order; a word may be a value."""
    pieces = [piece.split() for piece in message.split("...") if piece.strip()]
    pattern = re.compile(".*?".join(r"\s+".join(map(_word, words)) for words in pieces), re.DOTALL)
    return any(pattern.search(text) for text in strings_of_the_code())


def _word(word: str) -> str:
    return re.escape(word) if len(word) < 3 else rf"(?:{re.escape(word)}|\0)"


def messages(page: Path, header: str) -> list[str]:
    """What stands in backticks in the first column of the table with this header."""
    rows = text_of(page).partition(header)[2].partition("\n\n")[0].splitlines()
    first = [row.split(" | ")[0] for row in rows if row.startswith("| ")]
    return [message for cell in first for message in re.findall(r"`([^`]+)`", cell)]


MESSAGES = [
    *messages(ROOT / "docs" / "troubleshooting.md", "| message | what to do |"),
    *messages(ROOT / "docs" / "adding-a-family.md", "| message | what it means |"),
]


def test_the_tables_of_messages_are_found() -> None:
    assert len(MESSAGES) > 20
    assert not is_said("a message ... that nobody writes")


@pytest.mark.parametrize("message", MESSAGES)
def test_messages_are_those_of_the_code(message: str) -> None:
    assert is_said(message)


def test_the_example_adapter_is_the_real_one() -> None:
    page = text_of(ROOT / "docs" / "adding-a-family.md")
    example = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert example is not None
    real = re.sub(r" +# .*", "", text_of(ROOT / "offmoe/hf/adapters/dbrx.py"))
    assert re.sub(r" +# .*", "", example[1]).strip() in real
