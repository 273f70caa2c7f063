"""Operations that must survive any one failed call, with the judgement of each outcome. See faults.py.

Each is a function of a seam that runs its operation once for every n and returns a `Tally`. An outcome is right when
the operation either gave the reference result or raised an OffmoeError of one line, no thread, file or descriptor is
left, slots are whole, and the same operation without a failure gives the reference afterwards.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engines import PROMPT, assert_at_rest, leaves_nothing, open_tiny
from faults import WRITES, Outcome, Seam, check_refusal, each_nth, holdings

import offmoe
from offmoe.core.units import GIB
from offmoe.engine.conversation import Conversation
from offmoe.quantize.write import QuantiseOptions, quantise
from offmoe.tiers.device import SimulatedDevice
from offmoe.trace.reader import read_trace

NUM_NEW = 4
GREEDY: dict[str, Any] = {"max_new_tokens": NUM_NEW, "temperature": 0, "ignore_eos": True}
QUESTION = "Where is the harbour?"


@dataclass
class Tally:
    """Failed calls of one operation and seam: done without, refused, and wrong (with the reason)."""

    absorbed: int = 0
    refused: int = 0
    wrong: list[str] = field(default_factory=list)
    messages: set[str] = field(default_factory=set)

    @property
    def failed(self) -> int:
        """All of them."""
        return self.absorbed + self.refused + len(self.wrong)

    def judge(self, outcome: Outcome, check: Callable[[], None]) -> None:
        """`check` says what must hold after `outcome`; what it raises makes the outcome wrong."""
        try:
            if outcome.error is not None:
                self.messages.add(f"{type(outcome.error).__name__}: {check_refusal(outcome)}")
            check()
        except Exception as error:  # noqa: BLE001 - every one is a finding
            self.wrong.append(f"n={outcome.nth} {outcome.failed[:2]}: {type(error).__name__}: {error}"[:600])
            return
        self.absorbed += outcome.error is None
        self.refused += outcome.error is not None


@dataclass(frozen=True, kw_only=True)
class Case:
    """What operations work on: a model folder, a folder to write to, and options of the engine."""

    model: Path
    work: Path
    options: dict[str, Any] = field(default_factory=dict)
    on_device: bool = False

    def open(self) -> offmoe.Engine:
        """An engine with room for a quarter of the experts."""
        device = SimulatedDevice(1e12, capacity_bytes=4 * GIB) if self.on_device else None
        options = {"miss": "stream", **self.options} if self.on_device else self.options
        return open_tiny(self.model, simulated=device, **options)

    def root(self, seam: Seam) -> Path:
        """Files below it are those whose calls fail."""
        return self.work if seam is WRITES else self.model

    def ids(self, engine: offmoe.Engine) -> tuple[int, ...]:
        """The reference: greedy ids of a prompt that is read afresh."""
        return engine.generate(PROMPT, **GREEDY, reuse=False).token_ids


def load(case: Case, seam: Seam, **options: Any) -> Tally:
    """An engine is opened; it works, or nothing of it is left."""
    tally = Tally()
    with case.open() as engine:
        expected = case.ids(engine)
    before = holdings()
    opened: list[offmoe.Engine] = []

    def open_one() -> offmoe.Engine:
        opened.append(case.open())
        return opened[-1]

    for outcome in each_nth(open_one, seam, case.root(seam), **options):

        def check(outcome: Outcome = outcome) -> None:
            if outcome.error is None:
                with outcome.result as engine:
                    found = case.ids(engine)
                assert found == expected, f"{found=} {expected=}"
            assert holdings() == before, f"{holdings()=} {before=}"

        tally.judge(outcome, check)
    for engine in opened:  # one was not in the way of any failure
        engine.close()
    return tally


def generate(case: Case, seam: Seam, **options: Any) -> Tally:
    """A reply of an open engine, which is whole and usable afterwards or closed."""
    tally = Tally()
    with leaves_nothing():
        engine = case.open()
        expected, before = case.ids(engine), holdings()

        def reply() -> tuple[int, ...]:
            return case.ids(engine)

        for outcome in each_nth(reply, seam, case.root(seam), **options):
            if engine._loaded is None:  # the device was lost
                engine = case.open()

            def check(outcome: Outcome = outcome, engine: offmoe.Engine = engine) -> None:
                assert outcome.result in (None, expected), f"{outcome.result=} {expected=}"
                assert_at_rest(engine)
                found = case.ids(engine)
                assert found == expected, f"afterwards {found=} {expected=}"
                assert_at_rest(engine)
                assert holdings() == before, f"{holdings()=} {before=}"

            tally.judge(outcome, check)
        engine.close()
    return tally


def chat(case: Case, seam: Seam, **options: Any) -> Tally:
    """A second turn: it is remembered or it is not, and the next answer is that of a conversation without failures."""
    tally = Tally()
    with leaves_nothing(), case.open() as engine:
        talk = Conversation(engine, system="Be brief.")
        talk.ask("Hello.", **GREEDY)
        begun = list(talk.messages)

        def second(**options: Any) -> str:
            talk.messages = list(begun)
            return talk.ask(QUESTION, **GREEDY, **options).text

        expected, before = second(reuse=False), holdings()
        for outcome in each_nth(second, seam, case.root(seam), **options):

            def check(outcome: Outcome = outcome) -> None:
                assert_at_rest(engine)
                assert outcome.result in (None, expected), f"{outcome.result=} {expected=}"
                if outcome.error is not None and talk.messages != begun:  # what was said until then is remembered
                    assert talk.messages[:-1] == [*begun, {"role": "user", "content": QUESTION}]
                    assert expected.startswith(talk.messages[-1]["content"])
                found = second(reuse=False)
                assert found == expected, f"afterwards {found=} {expected=}"
                assert holdings() == before, f"{holdings()=} {before=}"

            tally.judge(outcome, check)
    return tally


def save(case: Case, seam: Seam, **options: Any) -> Tally:
    """A conversation written over an older one: the old or the new one is there, whole, and nothing else."""
    tally = Tally()
    folder = case.work / "saved"
    with leaves_nothing(), case.open() as engine:
        talk, old, found = (Conversation(engine, system=text) for text in ("new", "old", "none"))
        before = holdings()

        def write() -> None:
            talk.save(folder / "chat.json")

        def begin() -> None:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            old.save(folder / "chat.json")

        begin()
        for outcome in each_nth(write, seam, case.root(seam), **options):

            def check(outcome: Outcome = outcome) -> None:
                assert [path.name for path in folder.iterdir()] == ["chat.json"]
                found.load(folder / "chat.json")
                assert found.system == ("new" if outcome.error is None else "old")
                assert holdings() == before

            tally.judge(outcome, check)
            begin()
    return tally


def trace(case: Case, seam: Seam, **options: Any) -> Tally:
    """A reply whose routing is written: the file is whole, or a part that says so; the engine goes on without it."""
    tally = Tally()
    folder = case.work / "traces"
    folder.mkdir()
    with leaves_nothing(), case.open() as engine:
        expected, before = case.ids(engine), holdings()

        def record() -> tuple[int, ...]:
            with engine.trace(folder / "routing.trace"):
                return case.ids(engine)

        record()
        num_events = len(read_trace(folder / "routing.trace").events)
        for outcome in each_nth(record, seam, case.root(seam), **options):

            def check(outcome: Outcome = outcome) -> None:
                assert outcome.result in (None, expected)
                if outcome.error is None:
                    found = read_trace(folder / "routing.trace")
                    assert found.is_complete and len(found.events) == num_events
                names = {path.name for path in folder.iterdir()}
                assert names <= {"routing.trace", "routing.trace.partial"}, names
                assert_at_rest(engine)
                assert holdings() == before, f"{holdings()=} {before=}"
                assert record() == expected
                assert len(read_trace(folder / "routing.trace").events) == num_events

            tally.judge(outcome, check)
    return tally


def quantize(case: Case, seam: Seam, **options: Any) -> Tally:
    """A smaller checkpoint: refused half-way, the same call goes on, and the bytes are those of a run in one go."""
    tally = Tally()
    target, whole = case.work / "target", case.work / "whole"
    how = QuantiseOptions(expert_format="int4", shard_bytes=40_000)

    def write(folder: Path = target) -> None:
        quantise(case.model, folder, how, lambda stage, done, total: None)

    write(whole)
    expected, before = _hashes(whole), holdings()
    with leaves_nothing():
        for outcome in each_nth(write, seam, case.root(seam), **options):

            def check(outcome: Outcome = outcome) -> None:
                assert holdings() == before, f"{holdings()=} {before=}"
                if outcome.error is not None:
                    write()
                assert _hashes(target) == expected

            tally.judge(outcome, check)
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(target)
    return tally


def _hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


Operation = Callable[..., Tally]
OPERATIONS: dict[str, Operation] = {
    "load": load, "generate": generate, "chat": chat, "save": save, "trace": trace, "quantize": quantize,
}  # fmt: skip
