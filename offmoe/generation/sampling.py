"""From logits to a token, through transformers' own logits processors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from transformers import GenerationConfig
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from offmoe.base.errors import UsageError

Number = TypeVar("Number", int, float)
Chooser = Callable[[torch.Tensor, torch.Tensor], int]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen. Temperature 0 is greedy; then only the repetition penalty acts."""

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
    """What the user set, and the model publisher's generation_config for the rest (greedy unless it says do_sample).

    Raises UsageError naming the option and its range.
    """
    if temperature is None:
        temperature = _first(defaults.temperature, None, 1.0) if defaults.do_sample else 0.0
    top_k = _first(top_k, defaults.top_k, 0)
    top_p = _first(top_p, defaults.top_p, 1.0)
    min_p = _first(min_p, defaults.min_p, 0.0)
    repetition_penalty = _first(repetition_penalty, defaults.repetition_penalty, 1.0)
    _check("temperature", temperature, 0.0, math.inf)
    _check("top_k", top_k, 0, math.inf)
    _check("top_p", top_p, 1e-6, 1.0)
    _check("min_p", min_p, 0.0, 1.0)
    _check("repetition_penalty", repetition_penalty, 1e-6, math.inf)
    return Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty, seed=seed
    )


def _first(value: Number | None, default: Number | None, otherwise: Number) -> Number:
    if value is not None:
        return value
    return otherwise if default is None else default


def _check(name: str, value: float, low: float, high: float) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
        limits = f"between {low:g} and {high:g}" if high < math.inf else f"of at least {low:g}"
        raise UsageError(f"{name} is {value!r}; use a number {limits}")


def make_chooser(sampling: Sampling) -> Chooser:
    """A function (ids (1, S), logits (1, V)) -> token id."""
    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature == 0.0:
        return lambda ids, logits: int(processors(ids, logits.float()).argmax(dim=-1))
    if sampling.temperature != 1.0:
        processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k:
        processors.append(TopKLogitsWarper(int(sampling.top_k)))
    if sampling.top_p < 1.0:
        processors.append(TopPLogitsWarper(float(sampling.top_p)))
    if sampling.min_p > 0.0:
        processors.append(MinPLogitsWarper(float(sampling.min_p)))
    generator = torch.Generator()
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)

    def choose(ids: torch.Tensor, logits: torch.Tensor) -> int:
        probabilities = processors(ids, logits.float()).softmax(dim=-1)
        return int(torch.multinomial(probabilities, 1, generator=generator))

    return choose
