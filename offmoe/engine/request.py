"""One request of a caller, checked as a whole before anything runs, as the call that answers it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from offmoe.chat.reasoning import ReasoningGate
from offmoe.core.errors import UsageError
from offmoe.engine.call import Request
from offmoe.engine.prompt import check_ids, encode_prompt, stop_rules
from offmoe.engine.prompt_logprobs import PromptScorer
from offmoe.hf.context import longest_context
from offmoe.hf.door import GenerationConfig
from offmoe.loader.loaded import LoadedModel
from offmoe.sampling.grammar import GrammarCompiler, GrammarMask
from offmoe.sampling.logprobs import LogprobRecorder
from offmoe.sampling.params import RequestOptions, SamplingParams, sampling_of
from offmoe.sampling.processors import Rules, joined_stops, publisher_rules, reply_length
from offmoe.sampling.sampler import make_chooser, resolve_sampling


def make_call(
    parts: LoadedModel, prompt: str | Sequence[int], options: RequestOptions, *, end_ids: frozenset[int],
    vocab_size: int, grammars: GrammarCompiler,
) -> Request:  # fmt: skip
    """Check `prompt` and `options`, which `Engine.stream` describes, for a model whose replies end at `end_ids`.

    Raises UsageError, and ContextLengthError for a prompt that leaves no room for a token.
    """
    defaults = parts.model.generation_config
    assert defaults is not None
    params = sampling_of(options)
    reuse, own_text = _reuse(options), options.get("own_text", False)
    ids = encode_prompt(prompt, parts.tokenizer, vocab_size=vocab_size)
    if params.ignore_eos:
        end_ids = frozenset()
    rules = stop_rules(
        num_prompt=len(ids), context_length=parts.context_length,
        max_new_tokens=reply_length(params.max_new_tokens, defaults),
        stop=joined_stops(params.stops, defaults, parts.tokenizer), end_ids=end_ids,
        stop_token_ids=frozenset(check_ids(params.stop_token_ids or (), vocab_size=vocab_size)),
        tokenizer=parts.tokenizer, longest_context=longest_context(parts.model),
    )  # fmt: skip
    num_held = 1 if parts.model.config.is_encoder_decoder else len(ids)  # a decoder begins with one token of its own
    chosen = resolve_sampling(defaults, params)
    choose = options.get("choose") or make_chooser(
        chosen, parts.model.device, _rules(parts, num_held, end_ids), num_prompt=num_held,
        mask=_mask(parts, options, params, grammars, ids, num_held),
    )  # fmt: skip
    if params.logit_bias:
        check_ids(list(params.logit_bias), vocab_size=vocab_size)
    scorer = _scorer(parts, params.prompt_logprobs)
    recorder = None if params.logprobs is None else LogprobRecorder(choose, params.logprobs)
    return Request(
        ids=ids, tokenizer=parts.tokenizer, rules=rules, on_prefill=options.get("on_prefill") or _not_told,
        on_progress=options.get("on_progress"), choose=recorder or choose,
        logprobs=None if recorder is None else recorder.take, scorer=scorer,
        reuse=reuse if scorer is None else False, cache_salt=_salt(options), own_text=own_text,
    )  # fmt: skip


def _mask(
    parts: LoadedModel, options: RequestOptions, params: SamplingParams, grammars: GrammarCompiler,
    ids: Sequence[int], num_held: int,
) -> GrammarMask | None:  # fmt: skip
    """The rule of the grammar that is asked for, if there is any."""
    matcher = grammars.matcher(params)
    if matcher is None:
        return None
    gate = None
    if options.get("after_reasoning") and parts.tokenizer is not None:
        gate = ReasoningGate(parts.tokenizer, ids)
    return GrammarMask(matcher, num_held, gate=gate)


def _scorer(parts: LoadedModel, num_top: int | None) -> PromptScorer | None:
    """A scorer of the prompt that gives `num_top` likeliest tokens, in the memory of a prefill chunk's work."""
    if num_top is None:
        return None
    if parts.model.config.is_encoder_decoder:
        raise UsageError("prompt_logprobs: an encoder-decoder model reads its prompt without saying how likely it is")
    plan = parts.plan
    workspace = plan.workspace_bytes if plan.device is None else plan.device.workspace_bytes
    return PromptScorer(parts.model, num_top, workspace_bytes=workspace)


def _reuse(options: RequestOptions) -> bool | None:
    """True, False, or None: only what gives the bits of a fresh reading."""
    reuse: Any = options.get("reuse")
    if reuse not in {None, True, False}:
        raise UsageError(f"reuse is {reuse!r}; use True, False, or leave it out")
    return bool(reuse) if reuse is not None else None


def _salt(options: RequestOptions) -> str | None:
    salt = options.get("cache_salt")
    if salt is None or (isinstance(salt, str) and salt):
        return salt
    raise UsageError(f"cache_salt is {salt!r}; use a text that is not empty, or leave it out")


def _rules(parts: LoadedModel, num_prompt: int, end_ids: frozenset[int]) -> Rules:
    """The publisher's rules for a reply to that many tokens."""
    config: GenerationConfig | None = parts.model.generation_config
    return publisher_rules(config, num_prompt=num_prompt, end_ids=end_ids, device=parts.model.device)


def _not_told(done: int, total: int) -> None:
    """Nobody asked for the prompt's progress."""
