"""`offmoe chat` before a person, in terminals of several kinds, and in pipes."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

if sys.platform == "win32":
    pytest.skip("a pseudo-terminal is POSIX", allow_module_level=True)

from terminal import CTRL_C, CTRL_D
from warm_chat import WarmChat, WarmTerminal, run_piped

from offmoe.checkpoint.locate import demo_model_folder

STATS = r"\d+ tokens, [\d.]+ tok/s \| first token [^\n]*context \d+/\d+ \(\d+%\)\r\n"
PROMPT = r"(?:^|\n)> "
ENTER, ALT_ENTER, UP = "\r", "\x1b\r", "\x1b[A"
# What prompt_toolkit writes when it waits for keys: it has switched the pasting of several lines on.
READY = r"\x1b\[\?2004h"
RAM = ("--ram", "4GiB")


@pytest.fixture(scope="module")
def warm() -> Iterator[WarmChat]:
    with WarmChat() as warm:
        yield warm


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, made to speak until it is stopped: it may not say its end tokens."""
    folder = Path(shutil.copytree(demo_model_folder(), tmp_path_factory.mktemp("endless") / "model"))
    path = folder / "generation_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "suppress_tokens": values["eos_token_id"]}))
    return folder


def open_chat(warm: WarmChat, folder: Path, max_new_tokens: int, *options: object) -> WarmTerminal:
    """A simple terminal."""
    return WarmTerminal(warm, ["chat", folder, *RAM, "--max-new-tokens", max_new_tokens, *options], TERM="dumb")


def open_scripted(warm: WarmChat, said: str, tmp_path: Path, *options: object, **settings: Any) -> WarmTerminal:
    """A smart terminal, and a model that says the parts of `said` in turn."""
    settings = {"XDG_STATE_HOME": str(tmp_path / "state"), **settings}
    return WarmTerminal(warm, ["chat", *RAM, *options], said=said, **settings)


def seen(text: str) -> str:
    """Without what steers the terminal."""
    return re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", text).replace("\r", "")


def test_a_conversation(warm: WarmChat, folder: Path) -> None:
    with open_chat(warm, folder, 12) as terminal:
        opening = terminal.expect(PROMPT)
        assert "Ctrl-C stops a reply; /exit leaves." in opening
        assert "experts in RAM" in opening, "what goes where is said before the first prompt"

        terminal.send("hello\n")
        terminal.expect("hello\r\n")
        reply = terminal.expect(STATS)
        assert reply.splitlines()[-1].startswith("12 tokens, ")
        assert "".join(reply.splitlines()[:-1]).strip(), "the reply stands before its statistics"
        assert "[cut at 12 tokens" in terminal.expect(PROMPT)

        terminal.send(CTRL_C)
        assert "Ctrl-C again" in terminal.expect(PROMPT)
        terminal.send("half a line\\\n")
        terminal.expect(r"\n\. ")
        terminal.send("and the other half\n")
        terminal.expect("half\r\n")
        assert "reused)" in terminal.expect(STATS)
        terminal.expect(PROMPT)
        terminal.send("\n")
        terminal.expect(PROMPT)
        assert terminal.running, "neither one Ctrl-C nor an empty line leaves"
        terminal.send("/exit\n")
        assert terminal.wait() == 0
        assert "Traceback" not in terminal.shown and "\ufffd" not in terminal.shown


def test_ctrl_c_stops_the_reply_and_keeps_the_chat(warm: WarmChat, folder: Path) -> None:
    with open_chat(warm, folder, 1500, "--temperature", 1.0, "--seed", 1) as terminal:
        terminal.expect(PROMPT)
        for _ in range(2):
            terminal.send("hello\n")
            terminal.expect("hello\r\n")
            terminal.expect(r"\S")
            terminal.send(CTRL_C)
            terminal.expect(r"\[stopped\]\r\n")
            terminal.expect(PROMPT)
            assert terminal.running
        assert not [line for line in terminal.shown.splitlines() if "tok/s" in line], (
            "a stopped reply has no statistics"
        )
        terminal.send(CTRL_D)
        assert terminal.wait() == 0
        assert "Traceback" not in terminal.shown


def test_messages_are_taken_back_changed_and_read_from_files(warm: WarmChat, tmp_path: Path) -> None:
    saved, notes = tmp_path / "chat.json", tmp_path / "my notes.txt"
    notes.write_text("Notes of mine.")
    with open_scripted(warm, "Yes.", tmp_path) as terminal:

        def enter(line: str, answer: str) -> None:
            terminal.expect(READY)
            terminal.send(line + ENTER)
            terminal.expect(answer)

        def messages() -> list[str]:
            saved.unlink(missing_ok=True)
            enter(f"/save {saved}", r"saved \d messages")
            return [message["content"] for message in json.loads(saved.read_text())["messages"]]

        enter("/undo", "error: nothing was asked yet")
        enter("/edit Goodbye", "error: nothing was asked yet")
        enter("/think on", "error: the model's chat template cannot switch thinking")
        enter("/think maybe", "error: /think is 'maybe'; use on or off")
        enter("Hello", "tok/s")
        enter("And now?", "tok/s")
        enter("/undo", r"taken back: And now\?")
        assert messages() == ["Hello", "Yes."]
        enter(f"/file '{notes}' What is this?", "tok/s")
        assert messages()[2] == "What is this?\n\nmy notes.txt:\n\nNotes of mine."
        enter(f"/file {tmp_path / 'none.txt'}", "error: .*none.txt")
        enter("/edit What are those?", "tok/s")
        assert messages()[2:] == ["What are those?", "Yes."]
        enter("/edit", r"What are those\?")
        terminal.send(" Really?" + ENTER)
        terminal.expect("tok/s")
        assert messages()[2:] == ["What are those? Really?", "Yes."]
        enter("/clear", "forgotten")
        enter("/bye", "")
        assert terminal.wait() == 0


def test_every_command(warm: WarmChat, tmp_path: Path) -> None:
    said = "**First** reply.\n===\nSecond reply."
    saved, other = tmp_path / "my chat.json", tmp_path / "mine.txt"
    other.write_text("not a chat")
    with open_scripted(warm, said, tmp_path) as terminal:

        def enter(line: str, answer: str) -> str:
            terminal.expect(READY)
            terminal.send(line + ENTER)
            return seen(terminal.expect(answer))

        shown = enter("/help", r"begins a new one")
        for name in (
            "/help",
            "/reset",
            "/retry",
            "/system [TEXT]",
            "/set",
            "/stats",
            "/save FILE",
            "/load FILE",
            "/exit",
        ):
            assert name in shown
        enter("/retry", "error: nothing was asked yet")
        enter("/system", "system: none")
        enter("/system Be brief.", r"system: Be brief\.")
        enter("Hello", "First.{0,20} reply")
        enter("/retry", "Second reply")
        assert "reused)" in seen(terminal.expect(r"context \d+/\d+"))
        enter(f"/save {saved}", "saved 3 messages")
        record = json.loads(saved.read_text())
        assert [message["content"] for message in record["messages"]] == ["Be brief.", "Hello", "Second reply."]
        enter("/reset", "forgotten; the system message stays")
        enter("/system off", "system: none")
        enter(f"/load {saved}", r"loaded 3 messages, \d+ tokens")
        enter(f"/load {tmp_path}", r"error: \S+ is no saved conversation: it is no regular file")
        enter(f"/save {other}", "error: .*choose another name")
        enter("/save", r"error: /save needs FILE")
        enter("/reset now", r"error: /reset takes nothing, not 'now'")
        assert re.search(r"temperature +0\.0 \(the model", enter("/set", "repetition_penalty [^\n]*\n"))
        enter("/set temperature 0.7", r"temperature 0\.7")
        enter("/set temperature=warm", "error: temperature is 'warm'; use a number")
        enter("/set top_k 2.5", "error: top_k is '2.5'; use a whole number")
        enter("/set top_p 7", "error: top_p is 7.0")
        enter("/set temprature 1", "error: unknown setting 'temprature'; did you mean temperature.")
        enter("/set max_new_tokens 0", "error: max_new_tokens is 0")
        enter("/set temperature default", r"temperature 0\.0 \(the model")
        shown = enter("/stats", "memory: peak")
        assert re.search(r"prompts +\d+ tokens read, \d+ reused", shown) and "look-ups" in shown
        shown = enter("/sytem x", "sends it as text")
        assert "did you mean /system" in shown and "/retry" in shown
        enter(" /not a command", "First.{0,20} reply")
        enter("/quit", "")
        assert terminal.wait() == 0
        assert "Traceback" not in terminal.shown


def test_editing_history_and_leaving(warm: WarmChat, tmp_path: Path) -> None:
    with open_scripted(warm, "Yes.", tmp_path) as terminal:
        terminal.expect(READY)
        terminal.send("one\\" + ENTER + "two" + ALT_ENTER + "three" + ENTER)
        terminal.expect("Yes")
        terminal.expect(READY)
        terminal.send("\x1b[200~four\nfive\x1b[201~" + ENTER)
        terminal.expect("Yes")
        terminal.expect(READY)
        terminal.send(f"/save {tmp_path / 'chat.json'}" + ENTER)
        terminal.expect("saved 4")
        terminal.expect(READY)
        terminal.send("not sent" + CTRL_C + CTRL_C)
        terminal.expect("Ctrl-C again")
        terminal.expect(READY)
        terminal.send(CTRL_C)
        assert terminal.wait() == 0
    messages = json.loads((tmp_path / "chat.json").read_text())["messages"]
    assert [message["content"] for message in messages] == ["one\ntwo\nthree", "Yes.", "four\nfive", "Yes."]
    history = tmp_path / "state" / "offmoe" / "chat_history"
    assert history.stat().st_mode & 0o777 == 0o600
    with open_scripted(warm, "Yes.", tmp_path) as terminal:
        terminal.expect(READY)
        terminal.send(UP + UP + ENTER)
        terminal.expect(r"four[\s\S]*five[\s\S]*Yes\.")
        terminal.expect(READY)
        terminal.send(CTRL_D)
        assert terminal.wait() == 0


def test_markdown_and_reasoning_in_forty_columns(warm: WarmChat, tmp_path: Path) -> None:
    said = (
        "<think>\nA short thought, but longer than the terminal is wide.\n</think>\n\n# Title\n\nSome **bold** words, "
        "enough of them for two rows or three.\n\n```python\nx = 1\n```\n"
    )
    with open_scripted(warm, said, tmp_path, columns=40) as terminal:
        terminal.expect(READY)
        terminal.send("Hi" + ENTER)
        shown = terminal.expect(r"context[\s\S]*?\d+/\d+")
        rows = re.split(r"[\r\n]+", re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", shown.split("Hi")[-1]))
        assert max(map(len, rows)) < 40, rows
        assert "\x1b[1m" in shown and "**" not in shown, "bold, without its marks"
        assert any(row.startswith("│ ") for row in rows) and "<think>" not in shown
        assert "── python" in rows and "```" not in shown
        terminal.expect(READY)
        terminal.send(CTRL_D)
        assert terminal.wait() == 0


def test_ctrl_c_while_markdown_is_drawn(warm: WarmChat, tmp_path: Path) -> None:
    said = "One **bold** word. " * 40
    with open_scripted(warm, said, tmp_path, pause_ms=20) as terminal:
        terminal.expect(READY)
        terminal.send("Hi" + ENTER)
        terminal.expect("bold")
        terminal.send("typed ahead" + CTRL_C)
        terminal.expect(r"\[stopped\]")
        terminal.expect(READY)
        terminal.send("\x15/save " + str(tmp_path / "chat.json") + ENTER)
        terminal.expect("saved 2 messages")
        terminal.expect(READY)
        terminal.send(CTRL_D)
        assert terminal.wait() == 0
    said_until = json.loads((tmp_path / "chat.json").read_text())["messages"][1]["content"]
    assert said_until and said.startswith(said_until)


@pytest.mark.parametrize("how", ["flag", "environment", "dumb", "plain"])
def test_without_color(warm: WarmChat, how: str, tmp_path: Path) -> None:
    env: dict[str, Any] = {"environment": {"NO_COLOR": "1"}, "dumb": {"TERM": "dumb"}}.get(how, {})
    options = {"flag": ["--no-color"], "plain": ["--plain", "--no-history"]}.get(how, [])
    with open_scripted(warm, "`code` and **bold**", tmp_path, *options, **env) as terminal:
        terminal.expect(PROMPT if how == "dumb" else READY)
        terminal.send("Hi" + ("\n" if how == "dumb" else ENTER))
        shown = terminal.expect(r"context \d+/\d+")
        colors = [
            code for code in re.findall(r"\x1b\[([0-9;]*)m", shown) if re.search(r"(^|;)(3[0-7]|4[0-7]|9[0-7])", code)
        ]
        assert colors == []
        assert ("**bold**" in shown) == (how in {"dumb", "plain"})
        assert ("\x1b" in shown) == (how != "dumb")
        terminal.expect(PROMPT if how == "dumb" else READY)
        terminal.send(CTRL_D)
        assert terminal.wait() == 0
    assert (tmp_path / "state").exists() == (how in {"flag", "environment"})


@pytest.mark.parametrize("kind", ["folder", "bytes"])
def test_an_unusable_history_is_one_warning(warm: WarmChat, kind: str, tmp_path: Path) -> None:
    history = tmp_path / "state" / "offmoe" / "chat_history"
    if kind == "folder":
        history.mkdir(parents=True)
    else:
        history.parent.mkdir(parents=True)
        history.write_bytes(b"\xff\xfe\x00\x80")
    with open_scripted(warm, "Yes.", tmp_path) as terminal:
        assert terminal.expect(READY).count("warning: the history") == 1
        terminal.send("Hi" + ENTER)
        terminal.expect("Yes")
        terminal.expect(READY)
        terminal.send(UP + ENTER)
        terminal.expect("Yes")
        terminal.expect(READY)
        terminal.send(CTRL_D)
        assert terminal.wait() == 0
        assert terminal.shown.count("warning:") == 1
    assert history.is_dir() or history.read_bytes() == b"\xff\xfe\x00\x80", "it is left as it was"


def test_a_pipe_in_and_a_terminal_out(warm: WarmChat, tmp_path: Path) -> None:
    stdin = tmp_path / "stdin"
    stdin.write_text("line one\nline two\n")
    with open_scripted(warm, "Some **bold** words.", tmp_path, "-", stdin=stdin) as terminal:
        assert terminal.wait() == 0
        assert "\x1b[1mbold" in terminal.shown and terminal.shown.count("tok/s") == 1 and "\n> " not in terminal.shown


def test_pipes(warm: WarmChat, tmp_path: Path) -> None:
    """With a dash all input is one message; without, each line is one."""
    said = "<think>Hm.</think>One **bold** word.\n===\nTwo."

    def piped(stdin: str, *args: object) -> tuple[int, str, str]:
        return run_piped(warm, tmp_path, stdin, ["chat", *RAM, *args], said)

    code, out, err = piped("line one\nline two\n", "-")
    assert (code, out) == (0, "One **bold** word.\n"), err
    assert "[thinking] Hm." in err and err.count("tok/s") == 1
    code, out, err = piped("line one\n\n/stats\nline two\n/exit\nline three\n")
    assert (code, out) == (0, "One **bold** word.\nTwo.\n"), err
    assert err.count("tok/s") == 2 and "look-ups" in err
    code, out, err = piped("line one\nline two\n", "--json")
    replies = [json.loads(line) for line in out.splitlines()]
    assert [(reply["text"], reply["reasoning"]) for reply in replies] == [("One **bold** word.", "Hm."), ("Two.", "")]
    assert replies[0]["finish_reason"] == "stop" and replies[1]["reused_tokens"] > 0
    code, out, err = piped("line one\n/fly\nline two\n")
    assert code == 2 and "unknown command '/fly'" in err
    assert err.splitlines()[-1] == "error: 1 of 3 messages were not answered"
    assert piped("", "-")[0] == 2
    assert piped("", "a", "b")[2].startswith("error: 'b' is one argument too many")


def test_without_a_template_it_says_how_prompts_are_built(warm: WarmChat, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(demo_model_folder(), tmp_path / "base"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    code, _, err = run_piped(warm, tmp_path, "hi", ["chat", folder, "-", *RAM], "Yes.")
    assert code == 0 and "has no chat template: the prompt is all messages" in err
