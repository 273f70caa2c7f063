"""Facts that only a run of the model tells: bytes of KV cache a token, and whether a prompt may be cut.

Runs before any expert is loaded (the seam answers zero), on eight tokens, so it costs milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch.func import functional_call
from transformers import PreTrainedModel

from offmoe.core.errors import CheckpointError
from offmoe.hf.internals import cache_name
from offmoe.kv.cache import make_kv_cache
from offmoe.kv.layout import CacheLayout, cache_layout
from offmoe.kv.sizes import kv_bytes

_NUM_TOKENS = 8
# Relative difference of the last logits above which cutting the prompt changes the result. A layer that forgets its
# state at a cut differs by tens of percent; bfloat16 rounding by less than two.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}


@dataclass(frozen=True)
class ModelProbe:
    """`kv_bytes` for the whole context; `chunkable`: a prompt may go through the model in pieces. `layout` of a
    KV cache.
    """

    kv_bytes: int
    chunkable: bool
    layout: CacheLayout = field(default_factory=dict)


def predict_kv_bytes(model: PreTrainedModel, context_length: int) -> int:
    """Prediction of what `probe_model` will measure, from shapes alone, for a model without weights.

    0 for the few models whose code looks at values on the way (2 of 62 families): the probe says it later.
    """
    num_tokens = min(_NUM_TOKENS, context_length)
    shapes = {name: t.to("meta") for name, t in (*model.named_parameters(), *model.named_buffers())}
    given = {
        "input_ids": torch.ones(1, num_tokens, dtype=torch.long, device="meta"),
        cache_name(model): make_kv_cache(model, num_tokens), "use_cache": True,
    }  # fmt: skip
    try:
        with torch.no_grad(), _attributes_kept(model):
            output = functional_call(model, shapes, kwargs=given)
    except (NotImplementedError, RuntimeError, ValueError, TypeError):
        return 0
    return kv_bytes(getattr(output, cache_name(model)), num_tokens, context_length)


@contextmanager
def _attributes_kept(model: PreTrainedModel) -> Iterator[None]:
    """Context that gives every module back the attributes it had: rotary ones keep frequencies made in a call."""
    before = [(module, dict(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes in before:
            vars(module).clear()
            vars(module).update(attributes)


def probe_model(model: PreTrainedModel, context_length: int) -> ModelProbe:
    """Measure on the model itself, with experts that answer zero. Raises CheckpointError when it cannot run at all."""
    try:
        return _measure(model, context_length)
    except (torch.OutOfMemoryError, torch.AcceleratorError):  # not the checkpoint's fault: the loader explains them
        raise
    except (RuntimeError, ValueError, IndexError, ArithmeticError) as error:
        raise CheckpointError(
            f"{type(model).__name__} does not run with this config.json: {' '.join(str(error).split())[:200]}"
        ) from error


def _measure(model: PreTrainedModel, context_length: int) -> ModelProbe:
    num_tokens, name = min(_NUM_TOKENS, context_length), cache_name(model)
    ids = torch.arange(1, num_tokens + 1).remainder(model.config.get_text_config().vocab_size)[None].to(model.device)
    if model.config.is_encoder_decoder:  # the encoder sees its source whole
        with torch.no_grad():
            encoded = model.get_encoder()(input_ids=ids, return_dict=True)
            output = model(encoder_outputs=encoded, decoder_input_ids=ids, use_cache=True)
        caches = getattr(output, name)
        halves = (caches.self_attention_cache, caches.cross_attention_cache)
        return ModelProbe(sum(kv_bytes(half, num_tokens, context_length) for half in halves), chunkable=False)
    with torch.no_grad():
        output = model(input_ids=ids, use_cache=True, **{name: make_kv_cache(model, num_tokens)})
        whole_cache, whole = getattr(output, name), output.logits[0, -1].float()
        chunkable = False
        if num_tokens > 3:
            cut = num_tokens // 2
            first = model(input_ids=ids[:, :cut], use_cache=True, **{name: make_kv_cache(model, num_tokens)})
            second = model(input_ids=ids[:, cut:], use_cache=True, **{name: getattr(first, name)})
            difference = (whole - second.logits[0, -1].float()).abs().max() / whole.abs().max().clamp_min(1e-6)
            chunkable = bool(difference < _TOLERANCE.get(model.dtype, 3e-2))
    layout = cache_layout(whole_cache) if chunkable else {}
    return ModelProbe(kv_bytes(whole_cache, num_tokens, context_length), chunkable, layout)
