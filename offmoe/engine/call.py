"""One call of the engine, from a checked prompt to the chunks of its reply."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field

from offmoe.decode.compiled import DecodeCompiler
from offmoe.decode.paths import DecodePaths
from offmoe.engine.prefill_chunk import PrefillChunk
from offmoe.engine.prompt_logprobs import PromptScorer
from offmoe.engine.stats import GenerationStats, Totals
from offmoe.engine.step import generate_step
from offmoe.engine.stream import Chunk, StopRules, StreamClosed, stream_text
from offmoe.engine.translate import translate_step
from offmoe.hf.door import PreTrainedTokenizerBase
from offmoe.kv.prefix import PrefixCache
from offmoe.loader.loaded import LoadedModel
from offmoe.sampling.logprobs import TokenLogprobs
from offmoe.sampling.params import Chooser, PrefillProgress


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request; the fields as `Engine.stream` says. `logprobs`: those of the last token chosen. `closed` is set when
    nobody waits for the reply any more.
    """

    ids: list[int]
    tokenizer: PreTrainedTokenizerBase | None
    rules: StopRules
    choose: Chooser
    logprobs: Callable[[], TokenLogprobs] | None
    on_prefill: Callable[[int, int], None]
    on_progress: Callable[[PrefillProgress], None] | None
    scorer: PromptScorer | None
    reuse: bool | None
    cache_salt: str | None
    own_text: bool
    closed: threading.Event = field(default_factory=threading.Event)

    @property
    def prompt_logprobs(self) -> tuple[TokenLogprobs | None, ...] | None:
        """Those of the prompt, once it was read; None where they were not asked for."""
        return None if self.scorer is None else tuple(self.scorer.found)


def answer(
    call: Request, parts: LoadedModel, totals: Totals, kept: PrefixCache, decode: DecodeCompiler | DecodePaths,
    halving: PrefillChunk | None,
) -> Generator[Chunk, None, None]:  # fmt: skip
    """Begin a call. The chunks: the prompt is read where `kept` does not hold it, then comes the reply. `totals` gets
    what it cost.
    """
    recorder, began = parts.serving.recorder, time.perf_counter()
    decode.begin(num_held=len(kept.ids))
    num_reused = kept.begin(call.ids, reuse=call.reuse, root=kept.root(call.cache_salt))

    tell = _teller(call, parts, num_reused)

    def on_prefill(done: int, total: int) -> None:
        if call.closed.is_set():
            raise StreamClosed
        recorder.reading_prompt = done < total
        tell(done, total)

    def on_end(stats: GenerationStats) -> None:
        recorder.reading_prompt = False
        totals.add(stats)

    recorder.begin_prompt(len(call.ids) - num_reused)
    recorder.reading_prompt = kept.logits is None
    steps = generate_step(
        parts.model, call.ids, call.choose, kept=kept, chunk=halving.size if halving else parts.plan.prefill_chunk,
        on_prefill=on_prefill, decode=decode,
        smaller_chunk=halving.halve if halving else None, scorer=call.scorer,
    )  # fmt: skip
    chunks = stream_text(
        steps, call.tokenizer, call.rules, parts.cache.counters, num_prompt_tokens=len(call.ids),
        num_reused=num_reused, on_end=on_end, after=() if call.own_text else call.ids,
        way=lambda: (decode.path, decode.reason), logprobs=call.logprobs,
        prompt_logprobs=None if call.scorer is None else lambda: call.prompt_logprobs, began=began,
    )  # fmt: skip
    try:
        yield from chunks
    finally:  # behind the last chunk: nobody waits for it
        kept.keep()


def _teller(call: Request, parts: LoadedModel, num_reused: int) -> Callable[[int, int], None]:
    """A function that tells the caller of the prompt's progress, in both of the ways that there are."""
    counters, began = parts.cache.counters, time.perf_counter()
    disk_bytes = counters.disk_bytes

    def tell(done: int, total: int) -> None:
        call.on_prefill(done, total)
        if call.on_progress is not None:
            call.on_progress(
                PrefillProgress(
                    done_tokens=done,
                    total_tokens=total,
                    reused_tokens=num_reused,
                    disk_bytes=counters.disk_bytes - disk_bytes,
                    elapsed_s=time.perf_counter() - began,
                )
            )

    return tell


def translate(call: Request, parts: LoadedModel, totals: Totals) -> Generator[Chunk, None, None]:
    """The same of an encoder-decoder model: its encoder reads the prompt, its decoder writes."""
    steps = translate_step(parts.model, call.ids, call.choose, on_prefill=_teller(call, parts, 0))
    return stream_text(
        steps, call.tokenizer, call.rules, parts.cache.counters, num_prompt_tokens=len(call.ids),
        on_end=totals.add, logprobs=call.logprobs,
    )  # fmt: skip
