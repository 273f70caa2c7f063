"""Replies that follow a JSON schema, a regular expression or a grammar: llguidance says which tokens may come next.

Text of a schema, and time to compile it, are limited: both come from requests. A schema refers to nothing outside of
itself. The grammar's memory is the library's, bounded by its limits (a few MB).
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch

from offmoe.core.errors import UsageError
from offmoe.hf.door import LogitsProcessor, PreTrainedTokenizerBase
from offmoe.sampling.params import GRAMMAR_NAMES, SamplingParams

MOST_CHARACTERS_OF_GRAMMAR = 256 << 10
_MOST_DEPTH = 64
# Subschemas that are asked, one by one, which of them is wrong.
_MOST_ASKED = 300
_MOST_COMPILED = 8
# Keywords whose value is a schema; a list of schemas; schemas by name.
_SCHEMA = ("items", "additionalProperties", "not", "contains", "propertyNames", "if", "then", "else", "prefixItems")
_SCHEMAS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
# Any white space between values would let a small model write nothing else until its limit.
_JSON_FORM = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_ANY_OBJECT: dict[str, Any] = {"type": "object"}


class GrammarCompiler:
    """Compiles grammars for the tokens of one model, and keeps the last few. From any thread."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase | None, *, vocab_size: int, end_ids: Collection[int]
    ) -> None:  # fmt: skip
        self._tokenizer, self._vocab_size, self._end_ids = tokenizer, vocab_size, sorted(end_ids)
        self._lock = threading.Lock()
        self._tokens: Any = None
        self._compiled: OrderedDict[tuple[str, str], Any] = OrderedDict()

    def matcher(self, params: SamplingParams) -> Any:
        """A matcher at the begin of the grammar that `params` ask for; None where they ask for none.

        Raises UsageError for one that is wrong or too large, with its place, and where there can be none.
        """
        name = next((name for name in GRAMMAR_NAMES if getattr(params, name) is not None), None)
        if name is None:
            return None
        if params.ignore_eos:
            raise UsageError(f"{name} and ignore_eos exclude each other: only the model's end token ends such a reply")
        value: Any = getattr(params, name)
        text = check_schema(value) if name == "json_schema" else value
        if len(text) > MOST_CHARACTERS_OF_GRAMMAR:
            raise UsageError(f"{name} has {len(text)} characters, {MOST_CHARACTERS_OF_GRAMMAR} is the most; shorten it")
        with self._lock:
            compiled = self._compiled.get((name, text))
            if compiled is None:
                compiled = self._compiled[name, text] = self._compile(name, text)
            self._compiled.move_to_end((name, text))
            while len(self._compiled) > _MOST_COMPILED:
                self._compiled.popitem(last=False)
            return compiled.deep_copy()

    def _compile(self, name: str, text: str) -> Any:
        library = _library(name)
        if self._tokens is None:
            self._tokens = self._make_tokens(library, name)
        make = {
            "json_schema": partial(library.LLMatcher.grammar_from_json_schema, overrides=_JSON_FORM),
            "regex": library.LLMatcher.grammar_from_regex, "grammar": library.LLMatcher.grammar_from_lark,
        }[name]  # fmt: skip

        def problem(of: str) -> str:
            try:
                is_wrong, messages = library.LLMatcher.validate_grammar_with_warnings(make(of), self._tokens)
            except ValueError as error:
                return str(error)
            return str(messages[0]) if is_wrong else ""

        found = problem(text)
        if found:
            raise UsageError(f"{name}: {_place(text, problem) if name == 'json_schema' else ''}{_one_line(found)}")
        matcher = library.LLMatcher(self._tokens, make(text), log_level=0)
        if matcher.is_error():
            raise UsageError(f"{name}: {_one_line(matcher.get_error())}")
        return matcher

    def _make_tokens(self, library: Any, name: str) -> Any:
        backend: Any = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise UsageError(f"{name} needs a tokenizer of the tokenizers library, which this model lacks")
        if not self._end_ids:
            raise UsageError(f"{name} needs a model with an end token, which this one lacks; leave it out")
        num_tokens = max(self._vocab_size, backend.get_vocab_size(with_added_tokens=True))
        return library.LLTokenizer(backend.to_str(), n_vocab=num_tokens, eos_token=self._end_ids)


class Gate(Protocol):
    """Tells the tokens before the grammar; ReasoningGate is one."""

    @property
    def is_reasoning(self) -> bool:
        """The tokens that come next are not the grammar's."""

    @property
    def openers(self) -> frozenset[int]:
        """Tokens that may come although the grammar has begun: behind them it has not."""

    def add(self, token_id: int) -> bool:
        """Whether this token is the grammar's."""


class GrammarMask(LogitsProcessor):
    """Rules out tokens that the grammar does not let follow. For one reply."""

    def __init__(self, matcher: Any, num_prompt: int, *, gate: Gate | None = None) -> None:
        """`gate` says which tokens come before the grammar; None: no tokens."""
        self._matcher, self._num_seen, self._gate = matcher, num_prompt, gate

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Logits (1, V), minus infinity where a token may not follow. Raises UsageError for a grammar too complex."""
        new: list[int] = input_ids[0, self._num_seen :].tolist()
        self._num_seen += len(new)
        for token_id in new:
            if self._gate is None or self._gate.add(token_id):
                self._matcher.consume_token(token_id)
        if self._gate is not None and self._gate.is_reasoning:
            return scores
        bits = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise UsageError(f"the grammar cannot be followed: {_one_line(self._matcher.get_error())}")
        allowed = np.unpackbits(np.frombuffer(bits, dtype=np.uint8), bitorder="little")[: scores.shape[1]]
        mask = torch.zeros(scores.shape[1], dtype=torch.bool)
        mask[: len(allowed)] = torch.from_numpy(allowed).bool()
        if self._gate is not None and self._gate.openers:
            mask[list(self._gate.openers)] = True
        return scores.masked_fill(~mask.to(scores.device), -torch.inf)


def check_schema(value: Any) -> str:
    """The schema as text. True is any object. Raises UsageError for what is no JSON, or too deep."""
    if value is True:
        return json.dumps(_ANY_OBJECT)
    try:
        schema = json.loads(value) if isinstance(value, str) else value
        text = value if isinstance(value, str) else json.dumps(value)
    except (ValueError, TypeError, RecursionError) as error:
        raise UsageError(f"json_schema is no JSON: {_one_line(str(error))}") from None
    if not isinstance(schema, Mapping):
        raise UsageError(f"json_schema: a schema is an object, not {_one_line(text)[:60]}")
    deepest = max((path for path, _ in _values(schema)), key=len, default=())
    if len(deepest) > _MOST_DEPTH:
        where = _pointer(deepest[:8])
        raise UsageError(f"json_schema: {where}/... is nested more than {_MOST_DEPTH} deep, which is the most")
    return text


def _library(name: str) -> Any:
    try:
        import llguidance
    except ImportError:
        raise UsageError(f"{name} needs the package llguidance; pip install 'offmoe[grammar]'") from None
    return llguidance


def _place(text: str, problem: Callable[[str], str]) -> str:
    """The innermost schema that is wrong by itself, as "/properties/age: "; empty for the whole."""
    schema = json.loads(text)
    named = {name: schema[name] for name in ("$defs", "definitions") if isinstance(schema, dict) and name in schema}
    inside = sorted(list(_subschemas(schema, ()))[:_MOST_ASKED], key=lambda found: -len(found[0]))
    for path, part in inside:
        whole = {**named, **part} if isinstance(part, dict) and not set(path) & set(named) else part
        if not isinstance(part, bool) and problem(json.dumps(whole)):
            return f"{_pointer(path)}: "
    return ""


def _subschemas(schema: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if path:
        yield path, schema
    if not isinstance(schema, dict):
        return
    for name in _SCHEMA:
        if isinstance(schema.get(name), dict):
            yield from _subschemas(schema[name], (*path, name))
    for name in _SCHEMAS:
        if isinstance(schema.get(name), list):
            for idx, part in enumerate(schema[name]):
                yield from _subschemas(part, (*path, name, str(idx)))
    for name in _NAMED:
        if isinstance(schema.get(name), dict):
            for key, part in schema[name].items():
                yield from _subschemas(part, (*path, name, key))


def _values(value: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """All values inside with their paths, without recursion; not far below the depth that is allowed."""
    left: list[tuple[tuple[str, ...], Any]] = [((), value)]
    while left:
        path, item = left.pop()
        yield path, item
        if len(path) > _MOST_DEPTH:
            continue
        if isinstance(item, Mapping):
            left += [((*path, str(key)), inner) for key, inner in item.items()]
        elif isinstance(item, (list, tuple)):
            left += [((*path, str(idx)), inner) for idx, inner in enumerate(item)]


def _pointer(path: tuple[str, ...]) -> str:
    return "".join(f"/{part.replace('~', '~0').replace('/', '~1')}" for part in path)


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]
