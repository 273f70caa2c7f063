"""A finished generation, gathered from the pieces of its stream."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from offmoe.engine.stats import GenerationStats
from offmoe.engine.stream import Piece


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A finished generation. `finish_reason` and `stats` as in the last Piece of a stream.

    In a chat `text` is the answer and `reasoning` what the model wrote before it, without its marks.
    """

    text: str
    reasoning: str = ""
    token_ids: tuple[int, ...]
    finish_reason: str
    stats: GenerationStats


def collect(pieces: Iterable[Piece]) -> Reply:
    """All of a stream."""
    texts: dict[bool, list[str]] = {False: [], True: []}
    ids = []
    last = Piece("")
    for last in pieces:
        texts[last.reasoning].append(last.text)
        if last.token_id is not None:
            ids.append(last.token_id)
    assert last.stats is not None and last.finish_reason is not None, f"{last=}"
    return Reply(
        text="".join(texts[False]), reasoning="".join(texts[True]), token_ids=tuple(ids),
        finish_reason=last.finish_reason, stats=last.stats,
    )  # fmt: skip
