"""Encoder-decoder models, token by token: the source is read once, then the decoder writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from offmoe.core.errors import UsageError
from offmoe.hf.door import PreTrainedModel
from offmoe.hf.internals import cache_name
from offmoe.sampling.finite import NoTokenError, non_finite_error
from offmoe.sampling.params import Chooser


def translate_step(
    model: PreTrainedModel, source_ids: Sequence[int], choose: Chooser, *, on_prefill: Callable[[int, int], None]
) -> Iterator[int]:
    """Ids of the reply to `source_ids`, without end, as the model's own `generate` makes them.

    The decoder begins with generation_config's `decoder_start_token_id`; `forced_bos_token_id`, where it is set (the
    target language of NLLB), is the first token of the reply. Raises UsageError when there is nothing to begin with,
    NonFiniteError for logits that no token can be chosen from.
    """
    settings: Any = model.generation_config
    start = settings.decoder_start_token_id
    start = settings.bos_token_id if start is None else start
    if start is None:
        raise UsageError("the checkpoint names no decoder_start_token_id; set it in generation_config.json")
    source = torch.tensor([list(source_ids)], dtype=torch.long, device=model.device)
    encoder: Any = model.get_encoder()
    on_prefill(0, len(source_ids))
    with torch.inference_mode():
        encoded = encoder(input_ids=source, attention_mask=torch.ones_like(source), return_dict=True)
    on_prefill(len(source_ids), len(source_ids))
    ids = source.new_full((1, 1), start)
    name, cache, new = cache_name(model), None, ids
    forced = settings.forced_bos_token_id
    while True:
        with torch.inference_mode():
            output = model(
                encoder_outputs=encoded, attention_mask=torch.ones_like(source), decoder_input_ids=new,
                use_cache=True, **{name: cache},
            )  # fmt: skip
        cache = getattr(output, name)
        try:
            token_id = choose(ids, output.logits[:, -1]) if forced is None else int(forced)
        except NoTokenError:
            again = partial(model, input_ids=source, decoder_input_ids=ids, use_cache=False)
            raise non_finite_error(model, ids.shape[1], again) from None
        forced = None
        yield token_id
        new = ids.new_full((1, 1), token_id)
        ids = torch.cat([ids, new], dim=1)
