"""The publisher's rules about tokens in generation_config.json, by transformers' own logits processors.

Order and conditions are those of transformers' `generate`: rules act on greedy replies too, warpers on sampled ones.
A setting that offmoe does not follow is named in a note.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch

from offmoe.core.errors import UsageError
from offmoe.hf.door import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    GenerationConfig,
    LogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PreTrainedTokenizerBase,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TypicalLogitsWarper,
)
from offmoe.sampling.params import SamplingParams, check_texts

# Settings that change a reply in transformers and that offmoe has no part for, and the value at which they do nothing.
_NOT_FOLLOWED: dict[str, Any] = {
    "num_beams": 1, "num_beam_groups": 1, "penalty_alpha": 0.0, "guidance_scale": 1.0, "diversity_penalty": 0.0,
    "encoder_repetition_penalty": 1.0, "encoder_no_repeat_ngram_size": 0, "num_return_sequences": 1,
    "forced_eos_token_id": None, "top_h": None, "watermarking_config": None, "constraints": None,
    "force_words_ids": None, "dola_layers": None, "prompt_lookup_num_tokens": None, "token_healing": False,
    "remove_invalid_values": False, "renormalize_logits": False, "max_time": None,
}  # fmt: skip
_USUAL_LENGTH = 256


@dataclass(frozen=True, kw_only=True)
class Rules:
    """The publisher's processors of one reply: `first` before the repetition penalty, `always` behind it, `sampled`
    behind the user's warpers.
    """

    first: list[LogitsProcessor] = field(default_factory=list)
    always: list[LogitsProcessor] = field(default_factory=list)
    sampled: list[LogitsProcessor] = field(default_factory=list)


def publisher_rules(
    config: GenerationConfig | None, *, num_prompt: int, end_ids: Collection[int], device: torch.device
) -> Rules:
    """The rules of `config` for a reply to `num_prompt` tokens that `end_ids` end.

    `num_prompt` counts what the choosers' ids begin with: 1 for a decoder that has an encoder before it. Raises
    UsageError for values that cannot be.
    """
    if config is None:
        return Rules()
    try:
        return _rules(config, num_prompt, end_ids, device)
    except (TypeError, ValueError, LookupError) as error:
        raise impossible_rule(error) from None


def impossible_rule(error: Exception) -> UsageError:
    """The error for a value of generation_config.json that transformers' processor refuses."""
    return UsageError(f"generation_config.json has a rule that cannot be followed ({error}); mend or remove it there")


def _rules(config: GenerationConfig, num_prompt: int, end_ids: Collection[int], device: torch.device) -> Rules:
    ends = torch.tensor(sorted(end_ids), device=device)
    rules = Rules()
    if config.sequence_bias is not None:
        rules.first.append(SequenceBiasLogitsProcessor(config.sequence_bias))
    if config.no_repeat_ngram_size:
        rules.always.append(NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size))
    if config.bad_words_ids is not None:
        rules.always.append(NoBadWordsLogitsProcessor(config.bad_words_ids, ends if len(ends) else None))
    least = max(config.min_new_tokens or 0, (config.min_length or 0) - num_prompt)
    if least > 0 and len(ends):
        rules.always.append(MinNewTokensLengthLogitsProcessor(num_prompt, least, ends, device=str(device)))
    begin, forced = num_prompt, config.forced_bos_token_id
    if forced is not None:  # acts where the reply's first token is the second of all
        rules.always.append(ForcedBOSTokenLogitsProcessor(forced))
        begin += num_prompt == 1
    if config.exponential_decay_length_penalty is not None and len(ends):
        rules.always.append(ExponentialDecayLengthPenalty(config.exponential_decay_length_penalty, ends, num_prompt))
    if config.suppress_tokens is not None:
        rules.always.append(SuppressTokensLogitsProcessor(config.suppress_tokens, device=str(device)))
    if config.begin_suppress_tokens is not None:
        rules.always.append(
            SuppressTokensAtBeginLogitsProcessor(config.begin_suppress_tokens, begin, device=str(device))
        )
    if config.typical_p is not None and config.typical_p < 1.0:
        rules.sampled.append(TypicalLogitsWarper(config.typical_p))
    if config.epsilon_cutoff is not None and 0.0 < config.epsilon_cutoff < 1.0:
        rules.sampled.append(EpsilonLogitsWarper(config.epsilon_cutoff))
    if config.eta_cutoff is not None and 0.0 < config.eta_cutoff < 1.0:
        rules.sampled.append(EtaLogitsWarper(config.eta_cutoff, device=str(device)))
    return rules


def joined_stops(
    stops: tuple[str, ...], config: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[str, ...]:
    """The user's stop strings and the publisher's (`stop_strings`), which need a tokenizer."""
    published = None if config is None or tokenizer is None else config.stop_strings
    return (*stops, *check_texts("stop_strings in generation_config.json", published)) if published else stops


def reply_length(given: int | None, config: GenerationConfig | None) -> int:
    """The user's number of new tokens, else the publisher's (`max_new_tokens`), else 256.

    Not the publisher's `max_length`: old configs have transformers' former default of 20 there, prompt included.
    """
    if given is not None:
        return given
    published = None if config is None else config.max_new_tokens
    length = SamplingParams(max_new_tokens=published).max_new_tokens
    return _USUAL_LENGTH if length is None else length


def not_followed(config: GenerationConfig | None, *, has_text: bool = True) -> str | None:
    """One line that names the settings of generation_config.json that offmoe does not follow; None without any.

    `has_text`: the model has a tokenizer, without which stop strings cannot be found.
    """
    given = {} if config is None else {name: getattr(config, name, None) for name in _NOT_FOLLOWED}
    names = [name for name, value in given.items() if value is not None and value != _NOT_FOLLOWED[name]]
    settings = [f"{name} {given[name]!r}" for name in names]
    if config is not None and config.stop_strings and not has_text:
        settings.append(f"stop_strings {config.stop_strings!r} (the model has no tokenizer)")
    if not settings:
        return None
    return f"generation_config.json asks for {', '.join(settings)}, which offmoe does not follow: replies are without"
