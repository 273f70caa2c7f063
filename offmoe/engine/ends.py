"""Tokens that end a reply: the union of all places where a checkpoint may name them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from offmoe.chat.control_tokens import control_tokens
from offmoe.hf.door import GenerationConfig, PreTrainedTokenizerBase

# Names of end tokens of published models. The list is llama.cpp's (`special_eog_ids` in src/llama-vocab.cpp), with
# those of DeepSeek, Llama 4 and Hunyuan. They count as control tokens only: as plain text they mean nothing.
KNOWN_ENDS = frozenset({
    "<|eot_id|>", "<|eom_id|>", "<|eot|>", "<|eom|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|calls|>",
    "<|flush|>", "<end_of_turn>", "<turn|>", "<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "<EOT>",
    "_<EOT>", "[EOT]", "[EOS]", "<end_of_utterance>", "<|eos|>", "<eos>", "</s>",
})  # fmt: skip
# Where replies come in channels (gpt-oss; Solar Open) this ends a channel, and the reply goes on.
_CHANNEL_END, _CHANNEL_MARKS = "<|end|>", frozenset({"<|channel|>", "<|flush|>"})
# Gemma 4 has it in its vocabulary as text.
_TEXT_END, _TEXT_MARK = "</s>", "<|tool_response>"
# Parts of a multimodal config.json that describe its language model.
_LANGUAGE_PARTS = ("text_config", "thinker_config", "language_config", "llm_config")


def end_ids(
    generation: GenerationConfig | None, config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None
) -> frozenset[int]:
    """All ids that end a reply. `config` is config.json as it is written, without the defaults of a class.

    generation_config.json is believed as it is. config.json is often the base model's, or another tokenizer's: an id of
    it that the tokenizer holds for text is left out.
    """
    ids = set(_ids(generation.eos_token_id if generation is not None else None))
    stated = set(_stated(config))
    if tokenizer is None:
        return frozenset(ids | stated)
    names = control_tokens(tokenizer)
    spelt = set(names.values())
    ends = KNOWN_ENDS - ({_CHANNEL_END} if spelt & _CHANNEL_MARKS else set())
    ends -= {_TEXT_END} if _TEXT_MARK in spelt else set()
    ids |= {token_id for token_id in stated if token_id in names}
    ids |= {token_id for token_id, name in names.items() if name in ends}
    return frozenset(ids | set(_ids(tokenizer.eos_token_id)))


def _stated(config: Mapping[str, Any]) -> Iterator[int]:
    yield from _ids(config.get("eos_token_id"))
    for name in _LANGUAGE_PARTS:
        part = config.get(name)
        if isinstance(part, dict):
            yield from _stated(part)


def _ids(value: Any) -> Iterator[int]:
    for token_id in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(token_id, int) and not isinstance(token_id, bool) and token_id >= 0:
            yield token_id
