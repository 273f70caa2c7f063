"""The type that a model computes in, told from its config and headers: one answer for the loader and the planner.

The config's own word comes first, as in transformers' `dtype="auto"`. Without one it is the type of most bytes of the
plain tensors: a router's bias or a decay that is kept in float32 does not make a float32 model. No torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from offmoe.checkpoint.derived import StoredTensor
from offmoe.checkpoint.tensor_entry import FLOAT_TYPES
from offmoe.memory.shape import text_config

_BY_NAME = {
    "bfloat16": "BF16", "float16": "F16", "half": "F16", "float32": "F32", "float": "F32", "float64": "F64",
}  # fmt: skip
_BLOCKS = "blocks"


def model_dtype(config: Mapping[str, Any], tensors: Iterable[StoredTensor], *, is_gguf: bool) -> str:
    """The safetensors name of the model's type ("BF16"). `config` is config.json; a GGUF file's metadata name none.

    Quantised weights have no type of their own, a model of nothing else computes in bfloat16. So does a GGUF file in
    float16: llama.cpp multiplies its weights in float32, and one residual beyond 65504 makes float16 infinite. The
    weights stay float16 where they lie; they were bfloat16 before most files were made, and are again without loss.
    """
    if not is_gguf:
        for where in (config, text_config(config)):
            for key in ("dtype", "torch_dtype"):
                name = where.get(key)
                if isinstance(name, str) and name.removeprefix("torch.") in _BY_NAME:
                    return _BY_NAME[name.removeprefix("torch.")]
    sizes = Counter[str]()
    for entry in tensors:
        if entry.dtype in FLOAT_TYPES:
            sizes[entry.dtype] += entry.num_bytes
        elif is_gguf:
            sizes[_BLOCKS] += entry.num_bytes
    most = sizes.most_common(1)[0][0] if sizes else "BF16"
    return "BF16" if most == _BLOCKS or (is_gguf and most == "F16") else most
