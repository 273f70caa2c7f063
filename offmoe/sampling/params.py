"""Parameters of one request, checked. Imports no torch, so that it costs nothing before a model is loaded."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict

from offmoe.core.config import refuse_unknown
from offmoe.core.errors import UsageError

if TYPE_CHECKING:
    import torch

# (token ids so far (S,), logits (V,) in float32) -> logits (V,)
LogitsFunction: TypeAlias = "Callable[[torch.Tensor, torch.Tensor], torch.Tensor]"
# (token ids so far (1, S), logits (1, V)) -> token id
Chooser: TypeAlias = "Callable[[torch.Tensor, torch.Tensor], int]"

_SMALLEST_TOP_P = 1e-6
_LARGEST_BIAS = 100.0
# At most one of them says what a reply may be.
GRAMMAR_NAMES = ("json_schema", "regex", "grammar")


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillProgress:
    """Progress of a prompt: `done_tokens` of `total_tokens` that have to be read, beside `reused_tokens` that are kept.

    `disk_bytes` were read for it, in `elapsed_s` seconds.
    """

    done_tokens: int
    total_tokens: int
    reused_tokens: int
    disk_bytes: int
    elapsed_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """Rules for choosing the tokens of a reply and for ending it. None: what the model's generation_config says.

    max_new_tokens      tokens of the reply at most, at least 1; default: the model's own setting, else 256; 0
                        goes with prompt_logprobs: the prompt is read, and nothing written
    temperature         0 is greedy; default: greedy unless the model's publisher set sampling
    top_p               sample from the likeliest tokens that sum to this, above 0 to 1
    top_k               sample from that many likeliest tokens; 0: from all
    min_p               drop tokens below this times the likeliest one's probability, 0 to 1
    repetition_penalty  above 1: divide the logits of tokens that occurred, in the prompt too
    presence_penalty    -2 to 2: subtracted from the logits of tokens that occurred in the reply
    frequency_penalty   -2 to 2: the same, times how often they occurred
    seed                whole number that makes sampling repeatable
    stop                text, or several, that end the reply and are not part of it
    stop_token_ids      token ids that end the reply and are not part of it
    ignore_eos          go on after the model's end token
    logit_bias          token id to a number from -100 to 100, added to the token's logit
    logprobs            log probabilities of the chosen token and of this many likeliest ones, by the model's own logits
    prompt_logprobs     the same for every token of the prompt but the first; the whole prompt is read for it
    json_schema         the reply is JSON that this schema (a mapping, or its text; True: any object) takes
    regex               the reply is a text that this regular expression matches as a whole
    grammar             the reply is a text of this grammar, in Lark's form as llguidance reads it
    logits_processor    function, or several, (token_ids_S, logits_V) -> logits_V, applied before everything else

    Raises UsageError for a value out of range. Field names are vLLM's; its max_tokens is max_new_tokens here, as in
    transformers and on the command line.
    """

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    logit_bias: Mapping[int, float] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    json_schema: Mapping[str, Any] | str | bool | None = None
    regex: str | None = None
    grammar: str | None = None
    logits_processor: LogitsFunction | Sequence[LogitsFunction] | None = None

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, check(name, value))
        grammars = [name for name in GRAMMAR_NAMES if getattr(self, name) is not None]
        if len(grammars) > 1:
            raise UsageError(f"{' and '.join(grammars)} exclude each other; give one of them")
        if self.max_new_tokens == 0 and self.prompt_logprobs is None:
            raise UsageError("max_new_tokens is 0; use a whole number of at least 1 (0 goes with prompt_logprobs)")

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end the reply."""
        assert not isinstance(self.stop, str), "made a tuple"
        return tuple(self.stop or ())

    @property
    def processors(self) -> tuple[LogitsFunction, ...]:
        """Functions that change logits, in their order."""
        assert not callable(self.logits_processor), "made a tuple"
        return tuple(self.logits_processor or ())


class SamplingOptions(TypedDict, total=False):
    """Fields of SamplingParams as keywords."""

    max_new_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float
    frequency_penalty: float
    seed: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool
    logit_bias: Mapping[int, float] | None
    logprobs: int | None
    prompt_logprobs: int | None
    json_schema: Mapping[str, Any] | str | bool | None
    regex: str | None
    grammar: str | None
    logits_processor: LogitsFunction | Sequence[LogitsFunction] | None


class RequestOptions(SamplingOptions, total=False):
    """Keywords of `Engine.stream` and `Engine.generate`, which says what each does."""

    sampling: SamplingParams | None
    choose: Chooser | None
    on_prefill: Callable[[int, int], None]
    on_progress: Callable[[PrefillProgress], None]
    reuse: bool | None
    cache_salt: str | None
    own_text: bool
    queued: bool
    after_reasoning: bool


class ChatPromptOptions(TypedDict, total=False):
    """Keywords of `Engine.tokenize_chat`: how messages become a prompt."""

    chat_template_kwargs: Mapping[str, Any] | None
    allow_control_tokens: bool
    continue_final_message: bool


class ChatOptions(RequestOptions, ChatPromptOptions, total=False):
    """Keywords of `Engine.stream_chat`, `Engine.chat` and the calls of a Conversation."""


SAMPLING_NAMES = tuple(field.name for field in fields(SamplingParams))
REQUEST_NAMES = (
    *SAMPLING_NAMES, "sampling", "choose", "on_prefill", "on_progress", "reuse", "cache_salt", "own_text", "queued",
    "after_reasoning",
)  # fmt: skip


def sampling_of(options: RequestOptions) -> SamplingParams:
    """The sampling parameters of a call: `sampling`, with those changed that are given by name beside it.

    Raises UsageError for an unknown option, and for a value out of range.
    """
    refuse_unknown(options, REQUEST_NAMES)
    params = options.get("sampling") or SamplingParams()
    if not isinstance(params, SamplingParams):
        raise UsageError(f"sampling is a {type(params).__name__}; use offmoe.SamplingParams(...)")
    given: dict[str, Any] = {name: value for name, value in options.items() if name in SAMPLING_NAMES}
    return replace(params, **given) if given else params


def seeds_of(n: object, options: RequestOptions) -> list[RequestOptions] | None:
    """Changes of `options` for each of `n` replies to one prompt; None where there is one, which is no list then.

    Raises UsageError.
    """
    if n is None:
        return None
    seed = sampling_of(options).seed
    return [{} if seed is None else {"seed": seed + idx} for idx in range(_whole(1)("n", n))]


def _number(low: float, high: float | None = None) -> Callable[[str, object], float]:
    limits = f"of at least {low:g}" if high is None else f"between {low:g} and {high:g}"

    def check(name: str, value: object) -> float:
        try:
            number = float(value) if not isinstance(value, bool) and isinstance(value, Real) else math.nan
        except OverflowError:  # a whole number of hundreds of digits
            number = math.nan
        if math.isfinite(number) and low <= number <= (math.inf if high is None else high):
            return number
        raise UsageError(f"{name} is {value!r}; use a number {limits}")

    return check


def _share(name: str, value: object) -> float:
    """Any share above none; below the smallest one only the likeliest token is left, as with that one."""
    is_small = isinstance(value, Real) and 0.0 < value < _SMALLEST_TOP_P  # type: ignore[operator]
    return _number(_SMALLEST_TOP_P, 1.0)(name, _SMALLEST_TOP_P if is_small else value)


def _whole(low: int) -> Callable[[str, object], int]:
    def check(name: str, value: object) -> int:
        number = int(value) if not isinstance(value, bool) and isinstance(value, Integral) else low - 1
        if low <= number < 1 << 63:
            return number
        raise UsageError(f"{name} is {value!r}; use a whole number of at least {low}")

    return check


def _length(name: str, value: object) -> int:
    """0 has a meaning too, with prompt_logprobs."""
    return 0 if type(value) is int and value == 0 else _whole(1)(name, value)


def _schema(name: str, value: object) -> object:
    if value is True or isinstance(value, Mapping) or (isinstance(value, str) and value):
        return value
    raise UsageError(f"{name} is {value!r}; use a schema, its text, or True for any object")


def _text(name: str, value: object) -> str:
    if isinstance(value, str) and value:
        return value
    raise UsageError(f"{name} is {value!r}; use a text that is not empty")


def _switch(name: str, value: object) -> bool:
    if isinstance(value, bool):
        return value
    raise UsageError(f"{name} is {value!r}; use True or False")


def check_texts(name: str, value: object) -> tuple[str, ...]:
    """One text or several as a tuple. Raises UsageError for an empty one, and for what is no text."""
    texts = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, (list, tuple)) else None
    if texts is None or not all(isinstance(text, str) and text for text in texts):
        raise UsageError(f"{name} is {value!r}; use a text that is not empty, or a list of such")
    return texts


def _ids(name: str, value: Any) -> tuple[int, ...]:
    try:
        return tuple(operator.index(token_id) for token_id in value)
    except TypeError:
        raise UsageError(f"{name} is {value!r}; use a list of token ids") from None


def _biases(name: str, value: Any) -> dict[int, float]:
    """Token ids to numbers; ids may be texts of digits, which is all that JSON has for keys."""
    if not isinstance(value, Mapping):
        raise UsageError(f"{name} is {value!r}; use a mapping of token ids to numbers between -100 and 100")
    check = _number(-_LARGEST_BIAS, _LARGEST_BIAS)
    try:
        ids = {int(key) if isinstance(key, str) else operator.index(key): bias for key, bias in value.items()}
    except (TypeError, ValueError):
        raise UsageError(f"{name} has a key that is no token id among {list(value)[:3]!r}; use whole numbers") from None
    return {token_id: check(f"{name}[{token_id}]", bias) for token_id, bias in ids.items()}


def _functions(name: str, value: object) -> tuple[LogitsFunction, ...]:
    functions = (value,) if callable(value) else tuple(value) if isinstance(value, (list, tuple)) else ()
    if not all(callable(function) for function in functions) or not (functions or value in ([], ())):
        raise UsageError(f"{name} is {value!r}; use a function (token_ids, logits) -> logits, or a list of such")
    return functions


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "max_new_tokens": _length, "temperature": _number(0.0), "top_p": _share, "top_k": _whole(0),
    "min_p": _number(0.0, 1.0), "repetition_penalty": _number(1e-6), "presence_penalty": _number(-2.0, 2.0),
    "frequency_penalty": _number(-2.0, 2.0), "seed": _whole(0), "stop": check_texts, "stop_token_ids": _ids,
    "ignore_eos": _switch, "logit_bias": _biases, "logprobs": _whole(0),
    "prompt_logprobs": _whole(0), "json_schema": _schema, "regex": _text, "grammar": _text,
    "logits_processor": _functions,
}  # fmt: skip
