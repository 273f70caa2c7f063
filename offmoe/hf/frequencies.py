"""Factors of a GGUF file on the frequencies of a model's rotary positions."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from offmoe.checkpoint.gguf.rope import Frequencies
from offmoe.core.errors import CheckpointError, UnsupportedModelError


def scale_frequencies(model: PreTrainedModel, scale: Frequencies) -> None:
    """Divide the frequencies of every rotary module, and multiply what its cosines and sines are multiplied by.

    Raises UnsupportedModelError where no module has as many frequencies as there are factors.
    """
    if not all(value > 0 for value in scale.factors):  # of a file whose header alone is here they are 0
        raise CheckpointError("the GGUF file divides frequencies by 0 (rope_freqs); numbers above 0 are needed")
    found = False
    for module in model.modules():
        rotary: Any = module
        values = getattr(rotary, "inv_freq", None)
        if not isinstance(values, torch.Tensor):
            continue
        factors = torch.tensor(scale.factors or (1.0,) * len(values), dtype=values.dtype)
        if len(factors) != len(values) or not hasattr(rotary, "attention_scaling"):
            continue
        for name in ("inv_freq", "original_inv_freq"):
            if isinstance(buffer := getattr(rotary, name, None), torch.Tensor):
                setattr(rotary, name, buffer / factors)
        rotary.attention_scaling *= scale.attention
        found = True
    if not found:
        raise UnsupportedModelError(
            f"the GGUF file scales {len(scale.factors)} frequencies, of which {type(model).__name__} has none that are "
            "known; use the safetensors version of the model"
        )
