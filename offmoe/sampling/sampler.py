"""From logits to a token, through transformers' own logits processors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from offmoe.core.errors import UsageError
from offmoe.hf.door import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from offmoe.sampling.finite import NoTokenError
from offmoe.sampling.params import Chooser, LogitsFunction, SamplingOptions, SamplingParams
from offmoe.sampling.processors import Rules, impossible_rule

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Logits of float32 differ by 1e-7 of their size or not at all: divided by this and less, only the largest is left.
_GREEDY_BELOW = 1e-8
# Divided by less, logits may leave float32's range. From here on the largest is made 0, which changes no probability;
# not above, so that samples are bit by bit those of transformers.
_SHIFT_BELOW = 1e-3
# What is read instead of an id.
_NOT_FINITE, _ALL_RULED_OUT = -1, -2
NO_RULES = Rules()


def resolve_sampling(
    defaults: GenerationConfig, params: SamplingParams | None = None, **options: Unpack[SamplingOptions]
) -> SamplingParams:
    """`params`, with the `options` that are given beside them, and the publisher's generation_config for what both
    leave open: greedy unless it says do_sample. Raises UsageError naming the option and its range.
    """
    given = replace(params or SamplingParams(), **options)
    temperature = given.temperature
    if temperature is None:
        temperature = _first(defaults.temperature, 1.0) if defaults.do_sample else 0.0
    return replace(
        given, temperature=temperature, top_k=_first(given.top_k, _off_below_0(defaults.top_k), 0),
        top_p=_first(given.top_p, defaults.top_p, 1.0), min_p=_first(given.min_p, defaults.min_p, 0.0),
        repetition_penalty=_first(given.repetition_penalty, defaults.repetition_penalty, 1.0),
    )  # fmt: skip


def _off_below_0(top_k: Any) -> Any:
    """The publisher's -1, which other engines take for off."""
    return 0 if isinstance(top_k, int) and top_k < 0 else top_k


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


def _changed(function: LogitsFunction, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Logits (1, V) after a caller's function of ids (S,) and a copy of logits (V,). Raises UsageError for another
    shape.
    """
    changed = function(ids[0], scores[0].clone())
    if not isinstance(changed, torch.Tensor) or changed.shape != scores.shape[1:]:
        got = tuple(changed.shape) if isinstance(changed, torch.Tensor) else type(changed).__name__
        raise UsageError(f"logits_processor gave back {got}; it must give back logits ({scores.shape[1]},)")
    return changed.to(scores)[None]


class _ReplyPenalties(LogitsProcessor):
    """Subtracts from the logits of tokens in the reply: `frequency` times how often they occur, and `presence` once."""

    def __init__(self, num_prompt: int, presence: float, frequency: float) -> None:
        self._num_prompt, self._presence, self._frequency = num_prompt, presence, frequency

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Logits (1, V)."""
        replied = input_ids[:, self._num_prompt :]
        counts = torch.zeros_like(scores).scatter_add_(1, replied, scores.new_ones(replied.shape))
        return scores - self._frequency * counts - self._presence * (counts > 0)


class _ShiftToZero(LogitsProcessor):
    """Subtracts the largest logit from all."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Logits (1, V), the largest of them 0."""
        return scores - scores.amax(dim=-1, keepdim=True)


def greedy(ids: torch.Tensor, logits: torch.Tensor) -> int:
    """The id of the largest of logits (1, V). Raises NoTokenError where they are not finite."""
    return _choose(LogitsProcessorList(), _largest, ids, logits)


def make_chooser(
    sampling: SamplingParams, device: torch.device | None = None, rules: Rules = NO_RULES, *, num_prompt: int = 0,
    mask: LogitsProcessor | None = None,
) -> Chooser:  # fmt: skip
    """A function (ids (1, S), logits (1, V)) -> token id for resolved `sampling`. `rules` are the publisher's, for the
    reply at hand, whose ids begin with `num_prompt` of the prompt. `mask` rules out tokens before all else.

    It computes on `device`, where the logits are (None: the CPU); the id alone comes from there, at one wait. The
    function raises NoTokenError for logits that are not finite, UsageError where the rules leave no token.
    """
    assert sampling.temperature is not None and sampling.repetition_penalty is not None, "resolved"
    processors = LogitsProcessorList([*([] if mask is None else [mask]), *rules.first])
    if sampling.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.presence_penalty or sampling.frequency_penalty:
        processors.append(_ReplyPenalties(num_prompt, sampling.presence_penalty, sampling.frequency_penalty))
    if sampling.logit_bias:
        processors.append(SequenceBiasLogitsProcessor({(id_,): bias for id_, bias in sampling.logit_bias.items()}))
    processors.extend(rules.always)
    if sampling.temperature < _GREEDY_BELOW:
        return partial(_choose, processors, _largest, functions=sampling.processors)
    processors.extend(_warpers(sampling))
    processors.extend(rules.sampled)
    generator = torch.Generator(device or torch.device("cpu"))
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)

    def pick(scores: torch.Tensor) -> torch.Tensor:
        return torch.multinomial(scores.softmax(dim=-1), 1, generator=generator)

    return partial(_choose, processors, pick, functions=sampling.processors)


def _largest(scores: torch.Tensor) -> torch.Tensor:
    return scores.argmax(dim=-1)


def _warpers(sampling: SamplingParams) -> list[LogitsProcessor]:
    """The processors of sampling, in transformers' order."""
    warpers: list[LogitsProcessor] = []
    assert sampling.temperature is not None and sampling.top_p is not None and sampling.min_p is not None, "resolved"
    if sampling.temperature < _SHIFT_BELOW:
        warpers.append(_ShiftToZero())
    if sampling.temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0.0:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    return warpers


def _choose(
    processors: LogitsProcessorList, pick: Callable[[torch.Tensor], torch.Tensor], ids: torch.Tensor,
    logits: torch.Tensor, *, functions: Sequence[LogitsFunction] = (),
) -> int:  # fmt: skip
    """Take an id by `pick` from logits (1, V) after the caller's `functions` and `processors`. Whether there is any
    comes with the id.
    """
    is_choice = logits.amax().isfinite()  # no NaN and no plus infinity; minus infinity rules out single tokens
    scores = logits.float()
    for function in functions:
        scores = _changed(function, ids, scores)
    try:
        scores = processors(ids, scores)
    except ValueError as error:  # ids beyond the vocabulary, which biases and bad words name
        raise impossible_rule(error) from None
    is_left = scores.amax().isfinite() if processors or functions else is_choice
    # Zeros in the place of what is no number: CUDA gives a process up that samples from it.
    token = pick(torch.where(is_left, scores, 0.0)).view(())
    token_id = int(torch.where(is_choice, torch.where(is_left, token, _ALL_RULED_OUT), _NOT_FINITE))
    if token_id == _NOT_FINITE:
        raise NoTokenError
    if token_id == _ALL_RULED_OUT:
        raise UsageError(
            "the sampling options rule out every token; raise top_p, lower repetition_penalty, or mend logits_processor"
        )
    return token_id
