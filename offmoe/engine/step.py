"""The innermost loop: prompt ids in, one new id after another out. Knows no text, no clock, no statistics."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence

import torch

from offmoe.core.errors import NonFiniteError
from offmoe.engine.prompt_logprobs import HeadUnknownError, PromptScorer
from offmoe.hf.door import DynamicCache, PreTrainedModel
from offmoe.hf.internals import cache_name, experts_modules
from offmoe.hf.lengths import cos_sin_of, starts_over
from offmoe.kv.prefix import PrefixCache
from offmoe.kv.rewind import remember
from offmoe.machine.memory import give_back_freed_memory
from offmoe.sampling.finite import NoTokenError, non_finite_error
from offmoe.sampling.params import Chooser


def generate_step(
    model: PreTrainedModel, prompt_ids: Sequence[int], choose: Chooser, *, kept: PrefixCache, chunk: int,
    on_prefill: Callable[[int, int], None] = lambda done, total: None,
    decode: Callable[[Forward, torch.Tensor], torch.Tensor] | None = None,
    smaller_chunk: Callable[[int], int] | None = None, scorer: PromptScorer | None = None,
) -> Iterator[int]:  # fmt: skip
    """Yield token ids without end; the caller stops. The first id comes after the whole prompt was read.

    `kept` has begun with `prompt_ids`; what it lacks of them is read, and it receives all ids but the last one yielded.
    The prompt goes through in pieces of `chunk`; `on_prefill(done, total)` is called before the first and after each
    layer of each piece, in tokens that were not kept. `choose` sees all ids of this call, (1, S), and the last logits,
    (1, V). For ids after the prompt, `decode(forward, ids)` takes the place of `forward(ids)`. When the device has no
    memory for a piece of N tokens, `smaller_chunk(N)` says in what pieces to go on, or raises; without it the prompt
    fails. `scorer` is given the logits of all of the prompt, of which nothing may be kept then. Raises NonFiniteError
    for logits that no token can be chosen from.
    """
    with kept.guarded():
        forward = Forward(model, kept.cache, position=len(kept.ids))
        ids = torch.tensor([list(prompt_ids)], dtype=torch.long, device=model.device)
        logits = kept.logits
        if logits is None:
            forward.scorer = scorer
            try:
                logits = _read_prompt(model, forward, prompt_ids, kept, chunk, on_prefill, smaller_chunk)
            except HeadUnknownError:
                assert scorer is not None
                scorer.restart()
                kept.begin(prompt_ids, reuse=False)
                forward = Forward(model, kept.cache)
                forward.scorer = scorer
                logits = _read_prompt(model, forward, prompt_ids, kept, scorer.rows, on_prefill, smaller_chunk)
            forward.scorer = None
            kept.prompt_ends(logits)
        while True:
            try:
                token_id = choose(ids, logits)
            except NoTokenError:
                raise _no_numbers(model, ids, kept, chunk) from None
            yield token_id
            new = ids.new_full((1, 1), token_id)  # filled by the device: nothing to wait for
            ids = torch.cat([ids, new], dim=1)
            if ids.shape[1] == kept.turns_at and starts_over(model, ids, kept.cache):  # once in a reply, if at all
                so_far = ids[0].tolist()
                kept.begin(so_far, reuse=False)
                forward = Forward(model, kept.cache)
                logits = _read_prompt(model, forward, so_far, kept, chunk, lambda done, total: None, smaller_chunk)
                continue
            logits = decode(forward, new) if decode else forward(new)
            kept.ids.append(token_id)


def _no_numbers(model: PreTrainedModel, ids: torch.Tensor, kept: PrefixCache, chunk: int) -> NonFiniteError:
    """The error for logits after `ids` (1, S) that are none. All ids are read again, in the place of what was kept."""
    kept.begin(ids[0].tolist(), reuse=False)
    forward = Forward(model, kept.cache)
    error = non_finite_error(model, ids.shape[1], lambda: [forward(piece) for piece in ids.split(chunk, dim=1)])
    kept.forget()
    return error


def _read_prompt(
    model: PreTrainedModel, forward: Forward, prompt_ids: Sequence[int], kept: PrefixCache, chunk: int,
    on_prefill: Callable[[int, int], None], smaller_chunk: Callable[[int], int] | None,
) -> torch.Tensor:  # fmt: skip
    """The last logits, (1, V). One piece may take a minute on a large model, so layers are reported, not pieces."""
    if forward.scorer is not None and forward.scorer.in_short_pieces:
        chunk = min(chunk, forward.scorer.rows)
    layers = [module for _, module in experts_modules(model)]
    new_ids = list(prompt_ids[len(kept.ids) :])
    ids = torch.tensor([new_ids], dtype=torch.long, device=model.device)
    total, begin, size, layers_done = len(new_ids), 0, 0, 0

    def layer_done(*_: object) -> None:
        nonlocal layers_done
        layers_done = min(layers_done + 1, len(layers))
        on_prefill(begin + size * layers_done // (len(layers) + 1), total)

    on_prefill(0, total)
    logits = torch.empty(0)
    hooks = [layer.register_forward_hook(layer_done) for layer in layers]
    try:
        while begin < total:
            # Pieces end at multiples of their length from the begin of all: so a kept begin changes no later piece.
            piece = ids[:, begin : begin + chunk - len(kept.ids) % chunk]
            size, layers_done = piece.shape[1], 0
            with cos_sin_of(model, len(prompt_ids)), kept.reading(size):
                result = forward(piece) if smaller_chunk is None else forward.unless_out_of_memory(piece)
            if result is None:
                assert smaller_chunk is not None
                chunk = smaller_chunk(size)
                continue
            kept.ids += new_ids[begin : begin + size]
            kept.piece_read(size, chunk)
            logits, begin, size = result, begin + size, 0
            on_prefill(begin, total)
            if (
                begin < total or len(new_ids) > chunk
            ):  # scores grow from piece to piece, and no freed block is large enough for the next
                give_back_freed_memory()
    finally:
        for hook in hooks:
            hook.remove()
    return logits


class Forward:
    """Calls the model as its own `generate` does: with positions, for the last logits only, where it takes them.

    `position` is the number of tokens in the cache.
    """

    def __init__(self, model: PreTrainedModel, cache: DynamicCache | None, *, position: int = 0) -> None:
        self._model, self._cache, self.position = model, cache, position
        accepted = inspect.signature(model.forward).parameters
        self._cache_name = cache_name(model)
        self._takes_positions = "position_ids" in accepted
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        # Given the logits of all tokens that are read, while it is set.
        self.scorer: PromptScorer | None = None

    @property
    def cache(self) -> DynamicCache | None:
        """The KV cache; None before the model made one."""
        return self._cache

    @torch.inference_mode()
    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """Last logits (1, V) after appending ids (1, N)."""
        begin, self.position = self.position, self.position + ids.shape[1]
        positions = (
            {"position_ids": torch.arange(begin, self.position, device=ids.device)[None]}
            if self._takes_positions
            else {}
        )
        cache = {self._cache_name: self._cache}
        scorer = self.scorer
        with contextlib.nullcontext() if scorer is None else scorer.watching():
            options = self._options if scorer is None else {}
            output = self._model(input_ids=ids, use_cache=True, **cache, **positions, **options)
        self._cache = getattr(output, self._cache_name)
        if scorer is not None:
            scorer.score(ids, output.logits)
        logits: torch.Tensor = output.logits[:, -1]
        return logits

    def unless_out_of_memory(self, ids: torch.Tensor) -> torch.Tensor | None:
        """Call `forward`; None when the device had no memory for it, and then nothing was appended."""
        position, cache, rewind = self.position, self._cache, remember(self._cache)
        # Outside of the handler what it raised is gone, and with it the frames that keep the device's memory taken.
        with contextlib.suppress(torch.OutOfMemoryError):
            return self(ids)
        self.position, self._cache = position, cache
        rewind()
        return None
