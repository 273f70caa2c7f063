"""One call of the engine, from a checked prompt to the chunks of its reply."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass

from offmoe.decode.compiled import DecodeCompiler
from offmoe.decode.paths import DecodePaths
from offmoe.engine.prefill_chunk import PrefillChunk
from offmoe.engine.stats import GenerationStats, Totals
from offmoe.engine.step import generate_step
from offmoe.engine.stream import Chunk, StopRules, stream_text
from offmoe.engine.translate import translate_step
from offmoe.hf.door import PreTrainedTokenizerBase
from offmoe.kv.prefix import PrefixCache
from offmoe.loader.loaded import LoadedModel
from offmoe.sampling.logprobs import TokenLogprobs
from offmoe.sampling.params import Chooser


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request; the fields as `Engine.stream` says. `logprobs`: those of the last token chosen."""

    ids: list[int]
    tokenizer: PreTrainedTokenizerBase | None
    rules: StopRules
    choose: Chooser
    logprobs: Callable[[], TokenLogprobs] | None
    on_prefill: Callable[[int, int], None]
    reuse: bool | None
    own_text: bool


def answer(
    call: Request, parts: LoadedModel, totals: Totals, kept: PrefixCache, decode: DecodeCompiler | DecodePaths,
    halving: PrefillChunk | None,
) -> Generator[Chunk, None, None]:  # fmt: skip
    """Begin a call. The chunks: the prompt is read where `kept` does not hold it, then comes the reply. `totals` gets
    what it cost.
    """
    recorder = parts.serving.recorder
    decode.begin(num_held=len(kept.ids))
    num_reused = kept.begin(call.ids, reuse=call.reuse)

    def on_prefill(done: int, total: int) -> None:
        recorder.reading_prompt = done < total
        call.on_prefill(done, total)

    def on_end(stats: GenerationStats) -> None:
        recorder.reading_prompt = False
        totals.add(stats)

    recorder.begin_prompt(len(call.ids) - num_reused)
    recorder.reading_prompt = kept.logits is None
    steps = generate_step(
        parts.model, call.ids, call.choose, kept=kept, chunk=halving.size if halving else parts.plan.prefill_chunk,
        on_prefill=on_prefill, decode=decode,
        smaller_chunk=halving.halve if halving else None,
    )  # fmt: skip
    return stream_text(
        steps, call.tokenizer, call.rules, parts.cache.counters, num_prompt_tokens=len(call.ids),
        num_reused=num_reused, on_end=on_end, after=() if call.own_text else call.ids,
        way=lambda: (decode.path, decode.reason), logprobs=call.logprobs,
    )  # fmt: skip


def translate(call: Request, parts: LoadedModel, totals: Totals) -> Generator[Chunk, None, None]:
    """The same of an encoder-decoder model: its encoder reads the prompt, its decoder writes."""
    steps = translate_step(parts.model, call.ids, call.choose, on_prefill=call.on_prefill)
    return stream_text(
        steps, call.tokenizer, call.rules, parts.cache.counters, num_prompt_tokens=len(call.ids),
        on_end=totals.add, logprobs=call.logprobs,
    )  # fmt: skip
