"""From logits to a token, through transformers' own logits processors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from numbers import Integral, Real
from typing import Any, TypeVar

import torch
from transformers import GenerationConfig
from transformers.generation.logits_process import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from offmoe.core.errors import UsageError
from offmoe.engine.finite import NoTokenError
from offmoe.engine.processors import Rules, impossible_rule

Number = TypeVar("Number", int, float)
# Logits of float32 differ by 1e-7 of their size or not at all: divided by this and less, only the largest is left.
_GREEDY_BELOW = 1e-8
# Divided by less, logits may leave float32's range. From here on the largest is made 0, which changes no probability;
# not above, so that samples are bit by bit those of transformers.
_SHIFT_BELOW = 1e-3
_SMALLEST_TOP_P = 1e-6
# What is read instead of an id.
_NOT_FINITE, _ALL_RULED_OUT = -1, -2
NO_RULES = Rules()
Chooser = Callable[[torch.Tensor, torch.Tensor], int]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Choice of tokens. Temperature 0 is greedy; then only the repetition penalty acts."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None


def resolve_sampling(
    defaults: GenerationConfig, *, temperature: float | None = None, top_k: int | None = None,
    top_p: float | None = None, min_p: float | None = None, repetition_penalty: float | None = None,
    seed: int | None = None,
) -> Sampling:  # fmt: skip
    """The user's settings, and the model publisher's generation_config for the rest (greedy unless it says do_sample).

    Raises UsageError naming the option and its range.
    """
    if temperature is None:
        temperature = _first(defaults.temperature, None, 1.0) if defaults.do_sample else 0.0
    return Sampling(
        temperature=_number("temperature", temperature, 0.0, None),
        top_k=_whole("top_k", _first(top_k, _off_below_0(defaults.top_k), 0), 0),
        top_p=_number("top_p", _raised(_first(top_p, defaults.top_p, 1.0)), _SMALLEST_TOP_P, 1.0),
        min_p=_number("min_p", _first(min_p, defaults.min_p, 0.0), 0.0, 1.0),
        repetition_penalty=_number(
            "repetition_penalty", _first(repetition_penalty, defaults.repetition_penalty, 1.0), 1e-6, None
        ),
        seed=None if seed is None else _whole("seed", seed, 0),
    )


def _raised(top_p: Any) -> Any:
    """Any share above none; below the smallest one only the likeliest token is left, as with that one."""
    is_number = isinstance(top_p, Real)
    return _SMALLEST_TOP_P if is_number and 0.0 < top_p < _SMALLEST_TOP_P else top_p


def _off_below_0(top_k: Any) -> Any:
    """The publisher's -1, which other engines take for off."""
    return 0 if isinstance(top_k, int) and top_k < 0 else top_k


def _first(value: Number | None, default: Number | None, otherwise: Number) -> Number:
    if value is not None:
        return value
    return otherwise if default is None else default


def _number(name: str, value: object, low: float, high: float | None) -> float:
    try:
        number = float(value) if not isinstance(value, bool) and isinstance(value, Real) else math.nan
    except OverflowError:  # a whole number of hundreds of digits
        number = math.nan
    if math.isfinite(number) and low <= number <= (math.inf if high is None else high):
        return number
    limits = f"of at least {low:g}" if high is None else f"between {low:g} and {high:g}"
    raise UsageError(f"{name} is {value!r}; use a number {limits}")


def _whole(name: str, value: object, low: int) -> int:
    number = int(value) if not isinstance(value, bool) and isinstance(value, Integral) else -1
    if low <= number < 1 << 63:
        return number
    raise UsageError(f"{name} is {value!r}; use a whole number of at least {low}")


class _ShiftToZero(LogitsProcessor):
    """Subtracts the largest logit from all."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Logits (1, V), the largest of them 0."""
        return scores - scores.amax(dim=-1, keepdim=True)


def greedy(ids: torch.Tensor, logits: torch.Tensor) -> int:
    """The id of the largest of logits (1, V). Raises NoTokenError where they are not finite."""
    return _choose(LogitsProcessorList(), _largest, ids, logits)


def make_chooser(sampling: Sampling, device: torch.device | None = None, rules: Rules = NO_RULES) -> Chooser:
    """A function (ids (1, S), logits (1, V)) -> token id. `rules` are the publisher's, for the reply at hand.

    It computes on `device`, where the logits are (None: the CPU); the id alone comes from there, at one wait. The
    function raises NoTokenError for logits that are not finite, UsageError where the rules leave no token.
    """
    processors = LogitsProcessorList(rules.first)
    if sampling.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    processors.extend(rules.always)
    if sampling.temperature < _GREEDY_BELOW:
        return partial(_choose, processors, _largest)
    processors.extend(_warpers(sampling))
    processors.extend(rules.sampled)
    generator = torch.Generator(device or torch.device("cpu"))
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)
    return partial(
        _choose, processors, lambda scores: torch.multinomial(scores.softmax(dim=-1), 1, generator=generator)
    )


def _largest(scores: torch.Tensor) -> torch.Tensor:
    return scores.argmax(dim=-1)


def _warpers(sampling: Sampling) -> list[LogitsProcessor]:
    """The processors of sampling, in transformers' order."""
    warpers: list[LogitsProcessor] = []
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
    logits: torch.Tensor,
) -> int:  # fmt: skip
    """Take an id from the processed logits (1, V) by `pick`. Whether there is any comes with the id."""
    is_choice = logits.amax().isfinite()  # no NaN and no plus infinity; minus infinity rules out single tokens
    try:
        scores: torch.Tensor = processors(ids, logits.float())
    except ValueError as error:  # ids beyond the vocabulary, which biases and bad words name
        raise impossible_rule(error) from None
    is_left = scores.amax().isfinite() if processors else is_choice
    # Zeros in the place of what is no number: CUDA gives a process up that samples from it.
    token = pick(torch.where(is_left, scores, 0.0)).view(())
    token_id = int(torch.where(is_choice, torch.where(is_left, token, _ALL_RULED_OUT), _NOT_FINITE))
    if token_id == _NOT_FINITE:
        raise NoTokenError
    if token_id == _ALL_RULED_OUT:
        raise UsageError("the sampling options rule out every token; raise top_p or lower repetition_penalty")
    return token_id
