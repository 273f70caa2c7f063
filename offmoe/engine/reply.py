"""A finished generation, gathered from the chunks of its stream."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from offmoe.engine.stats import GenerationStats
from offmoe.engine.stream import Chunk, FinishReason
from offmoe.sampling.logprobs import TokenLogprobs

_SHOWN_LETTERS = 60


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class Reply:
    """A finished generation; fields as of Chunk, for all of its tokens.

    In a chat `text` is the answer and `reasoning` the text that the model wrote before it, without its marks.
    """

    text: str
    reasoning: str = ""
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_reason: int | str | None = None
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    stats: GenerationStats

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return self.stats.prompt_tokens

    def __repr__(self) -> str:
        shown = self.text if len(self.text) <= _SHOWN_LETTERS else f"{self.text[:_SHOWN_LETTERS]}..."
        return f"<Reply {shown!r} [{len(self.token_ids)} tokens, {self.finish_reason}]>"


def collect(chunks: Iterable[Chunk]) -> Reply:
    """All of a stream."""
    texts: dict[bool, list[str]] = {False: [], True: []}
    ids: list[int] = []
    logprobs: list[TokenLogprobs] = []
    of_prompt: tuple[TokenLogprobs | None, ...] | None = None
    last = Chunk("")
    for last in chunks:
        of_prompt = of_prompt or last.prompt_logprobs
        texts[last.reasoning].append(last.text)
        ids += last.token_ids
        logprobs += last.logprobs or ()
    assert last.stats is not None and last.finish_reason is not None, f"{last=}"
    return Reply(
        text="".join(texts[False]), reasoning="".join(texts[True]), token_ids=tuple(ids),
        finish_reason=last.finish_reason, stop_reason=last.stop_reason,
        logprobs=None if last.logprobs is None else tuple(logprobs), prompt_logprobs=of_prompt, stats=last.stats,
    )  # fmt: skip
