"""One call of the engine, from a checked prompt to the pieces of its reply."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from offmoe.decode.paths import DecodePaths
from offmoe.generation.compiled import DecodeCompiler
from offmoe.generation.prefill_chunk import PrefillChunk
from offmoe.generation.sampling import Chooser
from offmoe.generation.stats import Totals
from offmoe.generation.step import generate_step
from offmoe.generation.stream import Piece, StopRules, stream_text
from offmoe.generation.tracing import note_phases
from offmoe.generation.translate import translate_step
from offmoe.models.kv_prefix import KeptCache
from offmoe.models.loaded import LoadedModel


@dataclass(frozen=True, kw_only=True)
class Call:
    """What is asked for; the fields as `Engine.stream` says."""

    ids: list[int]
    tokenizer: PreTrainedTokenizerBase | None
    rules: StopRules
    choose: Chooser
    on_prefill: Callable[[int, int], None]
    reuse: bool | None
    own_text: bool


def answer(
    call: Call, parts: LoadedModel, totals: Totals, kept: KeptCache, decode: DecodeCompiler | DecodePaths,
    halving: PrefillChunk | None,
) -> Iterator[Piece]:  # fmt: skip
    """The prompt read where `kept` does not hold it, then the reply. `totals` gets what it cost."""
    decode.begin(len(call.ids) + call.rules.max_new_tokens, num_held=len(kept.ids))
    num_reused = kept.begin(call.ids, reuse=call.reuse)
    steps = generate_step(
        parts.model, call.ids, call.choose, kept=kept, chunk=halving.size if halving else parts.plan.prefill_chunk,
        on_prefill=call.on_prefill, decode=decode,
        smaller_chunk=halving.halve if halving else None,
    )  # fmt: skip
    steps = note_phases(steps, parts.serving.recorder, len(call.ids) - num_reused)
    with kept.guarded():
        yield from stream_text(
            steps, call.tokenizer, call.rules, parts.cache.counters, num_prompt_tokens=len(call.ids),
            num_reused=num_reused, on_end=totals.add, after=() if call.own_text else call.ids,
            way=lambda: (decode.path, decode.reason),
        )  # fmt: skip


def translate(call: Call, parts: LoadedModel, totals: Totals) -> Iterator[Piece]:
    """The same of an encoder-decoder model: its encoder reads the prompt, its decoder writes."""
    steps = translate_step(parts.model, call.ids, call.choose, on_prefill=call.on_prefill)
    yield from stream_text(
        steps, call.tokenizer, call.rules, parts.cache.counters, num_prompt_tokens=len(call.ids),
        on_end=totals.add,
    )  # fmt: skip
