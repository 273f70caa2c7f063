"""A stream of a chat whose chunks are all reasoning or all answer."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace

from offmoe.chat.control_tokens import control_tokens
from offmoe.chat.reasoning import make_splitter
from offmoe.engine.stream import Chunk, Stream
from offmoe.hf.door import PreTrainedTokenizerBase


def split_reasoning(
    chunks: Stream, tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int]
) -> Generator[Chunk, None, None]:
    """The same chunks, each all reasoning or all answer, without the marks. Closes `chunks` when it ends."""
    splitter, special = make_splitter(tokenizer, prompt_ids)
    with chunks:
        for chunk in chunks:
            hidden = "".join(special.get(token_id, "") for token_id in chunk.token_ids)
            parts = splitter.add(chunk.text + hidden)
            if chunk.finish_reason is not None:
                parts += splitter.flush()
            for reasoning, text in parts[:-1]:
                yield Chunk(text, reasoning=reasoning)
            reasoning, text = parts[-1] if parts else (False, "")
            yield replace(chunk, text=text, reasoning=reasoning)


def with_marks(chunks: Stream, tokenizer: PreTrainedTokenizerBase) -> Generator[Chunk, None, None]:
    """The same chunks, control tokens being text by their spelling. Closes `chunks` when it ends."""
    marks = control_tokens(tokenizer)
    with chunks:
        for chunk in chunks:
            yield replace(chunk, text=chunk.text + "".join(marks.get(token_id, "") for token_id in chunk.token_ids))
