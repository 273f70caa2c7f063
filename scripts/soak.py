"""Keeps an engine busy for hours and records whether anything grows: memory, threads, open files, objects.

One engine of a tiny random model lives through the whole run. Beside it others are opened and closed with other cache
sizes, policies and lookahead. The work is what users do: prompts, chats, streams that are closed early, Ctrl-C at any
moment, traces, saved conversations, transformers' own `generate`, and requests that are refused. The bundled model and
tiny models of other families (sliding windows, sinks, latent attention, states) take their turns too. Records are taken
while only the one engine is open.

Progress goes to stderr; the last line of stdout is the result as JSON. The exit code is 1 when something grew, ids
changed, or a reply in another thread failed.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import logging
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import benchlib.test_helpers  # noqa: F401
import psutil
import torch
from benchlib.machine import describe_machine
from engines import assert_at_rest, save_speaking, save_tiny

import offmoe
from offmoe.core.errors import OffmoeError
from offmoe.engine.conversation import Conversation

# Of 32 experts.
HOME_SLOTS = 10
SETS = (
    {"expert_slots": 4}, {"expert_slots": 7, "policy": "lru"}, {"expert_slots": 12, "policy": "lfru"},
    {"expert_slots": 32},
    {"expert_slots": 16, "prefetch": 1}, {"expert_slots": 6, "policy": "decayed", "prefetch": 2},
    {"expert_slots": 20, "policy": "decayed", "io": "buffered"}, {"expert_slots": 8, "warm_start": False},
    {"expert_slots": 9, "placement_invariant": True, "prefetch": "off"},
)  # fmt: skip
FAMILIES = ("qwen3_moe", "gpt_oss", "deepseek_v3", "qwen3_next", "mixtral")
WORDS = (
    "The old harbour", "Once upon a time", "A list of", "In the morning", "def main():", "She said that", "Because of",
    "Three ships", "The king and", "Every machine", "Write about rain", "What is a river?", "Numbers: 1, 2,", "Nobody",
)  # fmt: skip
PROBES = ("Once upon a time", "The harbour was", "A machine that")
PROBE_TOKENS = 48
# What may come and go between two records without being a leak: torch's and malloc's pools settle slowly.
SLACK_BYTES = 24 << 20


@dataclass(frozen=True, kw_only=True)
class Record:
    """Resources of this process while only the long-lived engine is open."""

    tokens: int
    seconds: float
    rss_bytes: int
    threads: int
    files: int
    objects: int


class Soak:
    """The run: counts tokens and does one piece of work after another."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.random = random.Random(seed)
        self.tokens = self.interrupts = self.engines = 0
        self.done: Counter[str] = Counter()
        self.folder = folder
        self.families = {name: save_tiny(folder / name, name) for name in FAMILIES}
        self.model = save_speaking(folder / "home")
        self.home = offmoe.load(self.model, expert_slots=HOME_SLOTS, ram="4GiB")
        self.begin = time.monotonic()

    def probe(self, engine: offmoe.Engine) -> list[tuple[int, ...]]:
        """Greedy ids of fixed prompts, read afresh."""
        found = [
            engine.generate(text, max_new_tokens=PROBE_TOKENS, temperature=0, ignore_eos=True, reuse=False).token_ids
            for text in PROBES
        ]
        self.tokens += sum(map(len, found))
        return found

    def record(self) -> Record:
        """Taken when garbage has been collected."""
        gc.collect()
        assert_at_rest(self.home)
        process = psutil.Process()
        return Record(
            tokens=self.tokens, seconds=round(time.monotonic() - self.begin, 1), rss_bytes=process.memory_info().rss,
            threads=process.num_threads(), files=process.num_fds(), objects=len(gc.get_objects()),
        )  # fmt: skip

    def step(self) -> None:
        """One piece of work on the long-lived engine, or with another one beside it."""
        work = self.random.choices(tuple(WORK), tuple(WORK.values()))[0]
        self.done[work.__name__] += 1
        work(self)
        assert_at_rest(self.home)

    def count(self, pieces: Iterator[Any]) -> Generator[Any, None, None]:
        """The pieces, their tokens counted."""
        for piece in pieces:
            self.tokens += len(piece.token_ids)
            yield piece

    def options(self) -> dict[str, Any]:
        """Options of a request."""
        sampled = {"temperature": self.random.choice((0.0, 0.7, 1.2)), "seed": self.random.randrange(1 << 30)}
        return {"max_new_tokens": self.random.randint(20, 400), "ignore_eos": True, **sampled}

    def prompt(self) -> str:
        """A prompt of one to sixty phrases."""
        return " ".join(self.random.choices(WORDS, k=self.random.choice((1, 2, 5, 20, 60))))


def generate(soak: Soak) -> None:
    """A reply, sometimes with reuse of the last prompt."""
    for _ in soak.count(
        soak.home.stream(soak.prompt(), reuse=soak.random.choice((None, True, False)), **soak.options())
    ):
        pass


def chat(soak: Soak) -> None:
    """Several turns, saved and loaded again."""
    talk = Conversation(soak.home, system=soak.random.choice((None, "Be brief.")))
    for _ in range(soak.random.randint(1, 5)):
        for _ in soak.count(talk.stream(soak.random.choice(WORDS), **soak.options())):
            pass
    talk.save(soak.folder / "chat.json")
    talk.load(soak.folder / "chat.json")
    with contextlib.suppress(OffmoeError):
        for _ in soak.count(talk.retry(**soak.options())):
            pass


def cancel(soak: Soak) -> None:
    """A stream that is closed before its end, and one that is only dropped."""
    stream = soak.count(soak.home.stream(soak.prompt(), **soak.options()))
    for _ in range(soak.random.randint(0, 30)):
        next(stream, None)
    if soak.random.random() < 0.5:
        stream.close()
    del stream
    gc.collect(0)


def interrupt(soak: Soak) -> None:
    """Ctrl-C at any moment of a reply."""
    signal.setitimer(signal.ITIMER_REAL, soak.random.uniform(0.001, 0.4))
    try:
        generate(soak)
    except KeyboardInterrupt:
        soak.interrupts += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def refuse(soak: Soak) -> None:
    """Requests and models that cannot be had."""
    for wrong in (
        lambda: soak.home.generate([1] * (soak.home.context_length + 1)), lambda: soak.home.generate([10**9]),
        lambda: soak.home.generate("x", temperature=-1), lambda: offmoe.load(soak.folder / "none"),
        lambda: offmoe.load(soak.model, expert_slots=1),
        lambda: offmoe.load(soak.model, ram="1MiB"),
    ):  # fmt: skip
        try:
            wrong()
        except OffmoeError:
            continue
        raise AssertionError("it should have been refused")


def trace(soak: Soak) -> None:
    """A reply whose routing is written to a file."""
    with soak.home.trace(soak.folder / "trace", guesses=soak.random.random() < 0.5):
        generate(soak)


def transformers_generate(soak: Soak) -> None:
    """The model's own loop."""
    ids = torch.tensor([soak.home.tokenizer.encode(soak.random.choice(WORDS))])  # type: ignore[union-attr]
    number = soak.random.randint(4, 24)
    with torch.inference_mode():
        soak.home.model.generate(ids, max_new_tokens=number, do_sample=False, pad_token_id=0)
    soak.tokens += number


def other_engine(soak: Soak) -> None:
    """The same model beside, with other settings."""
    soak.engines += 1
    with offmoe.load(soak.model, ram="4GiB", **soak.random.choice(SETS)) as engine:
        for _ in range(soak.random.randint(2, 6)):
            for _ in soak.count(engine.stream(soak.prompt(), **soak.options())):
                pass
        assert_at_rest(engine)


def demo(soak: Soak) -> None:
    """The bundled model, which is larger, in bfloat16."""
    soak.engines += 1
    with offmoe.load(expert_slots=48) as engine:
        for _ in soak.count(engine.stream(soak.prompt(), **soak.options())):
            pass
        assert_at_rest(engine)


def family(soak: Soak) -> None:
    """A tiny model of another kind of attention, left in the middle of a stream."""
    soak.engines += 1
    with offmoe.load(
        soak.families[soak.random.choice(FAMILIES)], ram="4GiB", expert_slots=soak.random.randint(4, 12)
    ) as engine:
        for _ in range(soak.random.randint(1, 3)):
            ids = [soak.random.randrange(2, 120) for _ in range(soak.random.randint(1, 60))]
            for _ in soak.count(engine.stream(ids, max_new_tokens=soak.random.randint(20, 150), ignore_eos=True)):
                pass
        stream = soak.count(engine.stream([5, 6, 7], max_new_tokens=20, ignore_eos=True))
        next(stream)
        stream.close()
        assert_at_rest(engine)


def threads(soak: Soak) -> None:
    """A reply in another thread than the one that loaded the engine."""
    worker = threading.Thread(target=generate, args=(soak,))
    worker.start()
    worker.join()


# Each with how often it is done.
WORK: dict[Callable[[Soak], None], int] = {
    generate: 8, chat: 8, cancel: 8, interrupt: 8, threads: 4, trace: 3, transformers_generate: 3, other_engine: 3,
    family: 3, refuse: 1, demo: 1,
}  # fmt: skip


def growth(records: list[Record], name: str) -> float:
    """The median of the last fifth less that of the second fifth: the first one is warming up."""
    values, fifth = [getattr(record, name) for record in records], max(1, len(records) // 5)
    return float(statistics.median(values[-fifth:]) - statistics.median(values[fifth : 2 * fifth]))


def run(num_tokens: int, num_records: int, seed: int, folder: Path) -> dict[str, Any]:
    """The whole soak. Ids are asked of the long-lived engine, and of a fresh one, at both ends."""

    def ring(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, ring)
    soak = Soak(folder, seed)
    at_start = soak.probe(soak.home)
    records: list[Record] = []
    while soak.tokens < num_tokens:
        soak.step()
        if soak.tokens >= len(records) * num_tokens / num_records:
            records.append(soak.record())
            print(json.dumps(asdict(records[-1])), file=sys.stderr, flush=True)
    at_end = soak.probe(soak.home)
    with offmoe.load(soak.model, expert_slots=HOME_SLOTS, ram="4GiB") as fresh:
        fresh_ids = soak.probe(fresh)
    totals = soak.home.stats()
    soak.home.close()
    grown = {name: growth(records, name) for name in ("rss_bytes", "threads", "files", "objects")}
    flat = grown["rss_bytes"] < SLACK_BYTES and grown["threads"] <= 0 and grown["files"] <= 0
    return {
        "tokens": soak.tokens, "seconds": round(time.monotonic() - soak.begin, 1), "seed": seed, "work": soak.done,
        "engines": soak.engines, "interrupts": soak.interrupts, "grown": grown, "flat": flat,
        "same_ids": at_start == at_end == fresh_ids, "peak_rss_growth_bytes": totals["peak_rss_growth_bytes"],
        "records": [asdict(record) for record in records], "machine": describe_machine(),
    }  # fmt: skip


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--records", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    logging.getLogger("offmoe").setLevel(logging.ERROR)  # a busy machine, and settings that are meant to be odd
    torch.set_num_threads(1)
    failures: list[str] = []
    threading.excepthook = lambda failed: failures.append(f"{failed.exc_type.__name__}: {failed.exc_value}")
    with tempfile.TemporaryDirectory() as folder:
        result = run(args.tokens, args.records, args.seed, Path(folder)) | {"failures": Counter(failures)}
    print(json.dumps(result))
    return 0 if result["flat"] and result["same_ids"] and not failures else 1


if __name__ == "__main__":
    sys.exit(main())
