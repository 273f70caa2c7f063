"""Which model a checkpoint is, wherever it lies: so that traces and settings of one are not used for another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from offmoe.checkpoint.index import CheckpointIndex, read_config
from offmoe.checkpoint.quant_config import read_quantisation
from offmoe.checkpoint.tensor_entry import TensorEntry

# What a config says of who saved it and how it is loaded, not of the model.
_NOT_THE_MODEL = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")


def model_hash(folder: Path, stored: Mapping[str, TensorEntry] | None = None) -> str:
    """64 hexadecimal digits from config.json and the names, types and shapes of all tensors; no weight is read.

    The same for a copy, and for the same tensors in other files. `stored`: the tensors, where they are known already.
    """
    config = {name: value for name, value in read_config(folder).items() if name not in _NOT_THE_MODEL}
    if stored is None:
        index = CheckpointIndex.open(folder, read_quantisation(config))
        index.close()
        stored = index.stored
    tensors = sorted((entry.name, entry.dtype, list(entry.shape)) for entry in stored.values())
    text = json.dumps([config, tensors], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
