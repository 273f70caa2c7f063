"""A user's prompt and stop strings, checked and turned into ids and rules."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from pathlib import Path

from offmoe.chat.messages import chat_ids
from offmoe.chat.template import Message
from offmoe.core.errors import ContextLengthError, UsageError
from offmoe.engine.stream import StopRules
from offmoe.hf.door import PreTrainedModel, PreTrainedTokenizerBase
from offmoe.hf.tokens.tokenizing import check_rows, check_text, tokenizing
from offmoe.sampling.params import ChatPromptOptions


def encode_prompt(
    prompt: str | Sequence[int], tokenizer: PreTrainedTokenizerBase | None, *, vocab_size: int
) -> list[int]:
    """Token ids of a text, or of a sequence of whole numbers. Raises UsageError."""
    if isinstance(prompt, str):
        if tokenizer is None:
            raise UsageError("the model has no tokenizer; give token ids instead of text")
        check_text(prompt, "the prompt")
        with tokenizing("the model"):
            ids = check_rows(tokenizer(prompt)["input_ids"], tokenizer, vocab_size=vocab_size)
    else:
        ids = check_ids(prompt, vocab_size=vocab_size)
    if not ids:
        raise UsageError("the prompt is empty; give at least one token")
    return ids


def chat_prompt(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, messages: Sequence[Message],
    options: ChatPromptOptions, *, folder: Path,
) -> list[int]:  # fmt: skip
    """Token ids of a conversation whose next turn is the model's. Raises UsageError, also where it can have none."""
    if model.config.is_encoder_decoder:
        raise UsageError("an encoder-decoder model rewrites a text and holds no conversation; use generate")
    if tokenizer is None:
        raise UsageError(f"{folder} has no tokenizer, which a conversation needs; use generate with token ids")
    return chat_ids(
        tokenizer, messages, vocab_size=int(model.config.get_text_config().vocab_size),
        arguments=options.get("chat_template_kwargs"), allow_control_tokens=options.get("allow_control_tokens", False),
        continue_final_message=options.get("continue_final_message", False),
    )  # fmt: skip


def is_list_of_prompts(prompt: object) -> bool:
    """True for a list or tuple of texts or of id sequences."""
    if not isinstance(prompt, (list, tuple)) or not prompt:
        return False
    return isinstance(prompt[0], (str, list, tuple)) or getattr(prompt[0], "ndim", 0) == 1


def check_ids(ids: Sequence[int], *, vocab_size: int) -> list[int]:
    """Plain ints of a sequence of ids (a list, an array, a 1-D tensor). Raises UsageError for what is no token."""
    try:
        checked = [operator.index(token) for token in ids]
    except TypeError:
        raise UsageError(f"the prompt is a {type(ids).__name__}; give text, or a sequence of token ids") from None
    bad = next((token for token in checked if not 0 <= token < vocab_size), None)
    if bad is not None:
        raise UsageError(f"token id {bad} is not in the vocabulary of {vocab_size}")
    return checked


def stop_rules(
    *, num_prompt: int, context_length: int, max_new_tokens: int, stop: tuple[str, ...], end_ids: frozenset[int],
    stop_token_ids: frozenset[int], tokenizer: PreTrainedTokenizerBase | None, longest_context: int | None = None,
) -> StopRules:  # fmt: skip
    """Make the rules that end a reply. Raises UsageError, and ContextLengthError for a prompt without room for a token.

    `longest_context`: tokens that the model takes at most, None where it does not say.
    """
    if stop and tokenizer is None:
        raise UsageError("the model has no tokenizer, so stop strings cannot be found; leave stop out")
    for text in stop:
        assert tokenizer is not None
        _refuse_impossible(text, tokenizer)
    check_room(num_prompt, context_length, longest_context)
    return StopRules(
        end_ids=end_ids, stop_token_ids=stop_token_ids, stop_strings=stop,
        max_new_tokens=min(max_new_tokens, context_length - num_prompt),
    )  # fmt: skip


def check_room(num_prompt: int, context_length: int, longest_context: int | None) -> None:
    """Raise ContextLengthError for a prompt that leaves no room for a reply of one token."""
    if num_prompt < context_length:
        return
    advice = f"shorten it or use --context-length {num_prompt + 1} or more"
    if longest_context is not None and num_prompt >= longest_context:
        advice = f"shorten it: the model was made for {longest_context}"
    raise ContextLengthError(
        f"the prompt has {num_prompt} tokens, the context {context_length} with room for a reply of at least 1; "
        f"{advice}"
    )


def _refuse_impossible(stop: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UsageError for a stop string with a character that no reply can have: it would never end one."""
    check_text(stop, f"the stop text {stop!r}")
    # A tokenizer that knows bytes gives every character back; others are asked for their whole vocabulary.
    missing = [letter for letter in dict.fromkeys(stop) if letter not in _round_trip(letter, tokenizer)]
    if missing:
        letters = {letter for token in tokenizer.get_vocab() for letter in token}
        missing = [letter for letter in missing if letter not in letters and not letter.isspace()]
    if missing:
        raise UsageError(
            f"stop is {stop!r}, and the model's vocabulary cannot write {missing[0]!r}: it would never end a reply; "
            "leave it out"
        )


def _round_trip(letter: str, tokenizer: PreTrainedTokenizerBase) -> str:
    text = tokenizer.decode(tokenizer(letter, add_special_tokens=False)["input_ids"], skip_special_tokens=True)
    assert isinstance(text, str)
    return text
