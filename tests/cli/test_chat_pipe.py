"""`offmoe chat` in a pipe: every message gets a reply or an error; options of the template; narrow encodings."""

from __future__ import annotations

import json

import pytest
from commands import fail, invoke, run

SHORT = ("--max-new-tokens", 3, "--context-length", 96, "--expert-slots", 48, "--temperature", 0)


def test_a_message_that_cannot_be_answered_does_not_end_the_run() -> None:
    result = invoke("chat", "--json", *SHORT, stdin=f"Hello\n/nope\n{'word ' * 500}\n\nBye\n")
    assert result.exit_code == 2
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert [sorted({"text", "error"} & set(record)) for record in records] == [["text"], ["error"], ["error"], ["text"]]
    assert records[1]["error"].startswith("unknown command '/nope'") and records[1]["message"] == 2
    assert "the context 96" in records[2]["error"] and records[2]["message"] == 3
    assert result.stderr.splitlines()[-1] == "error: 2 of 4 messages were not answered"
    alone = invoke("chat", "--json", *SHORT, stdin="Hello\nBye\n")
    assert alone.exit_code == 0
    assert [json.loads(line)["text"] for line in alone.stdout.splitlines()] == [records[0]["text"], records[3]["text"]]


def test_without_json_errors_are_lines_of_standard_error() -> None:
    result = invoke("chat", "--plain", *SHORT, stdin="/set nothing 3\nHello\n")
    assert result.exit_code == 2 and result.stdout.strip()
    assert "error: message 1: unknown setting 'nothing'" in result.stderr
    assert result.stderr.splitlines()[-1] == "error: 1 of 2 messages were not answered"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--template-arg", "enable_thinking"), "use NAME=VALUE"), (("--template-arg", "=1"), "use NAME=VALUE"),
        (("--template-arg", "enable_thinkin=1"), "no argument 'enable_thinkin'"),
        (("--thinking", "on"), "cannot switch thinking on or off"),
    ],
)  # fmt: skip
def test_arguments_that_the_template_has_not(args: tuple[str, ...], says: str) -> None:
    result = invoke("chat", *args, *SHORT, stdin="Hello\n")
    assert (result.exit_code, result.stdout) == (2, "")
    assert says in result.stderr.splitlines()[-1]


def test_an_unknown_switch_is_refused_at_once() -> None:
    assert "'maybe' is not one of 'on', 'off'" in fail("chat", "--thinking", "maybe")


def test_json_on_an_output_that_is_not_utf8() -> None:
    """Letters that the output cannot carry are escaped, not replaced by question marks."""
    found = run("chat", "--json", *SHORT, stdin="/nöpe\n", PYTHONIOENCODING="ascii:surrogateescape")
    assert "?" not in found.stdout, found.stderr
    record = json.loads(found.stdout)
    assert record["error"].startswith("unknown command ") and found.stdout.isascii() and "\\u" in found.stdout
