"""Every GGUF architecture that is read, by llama.cpp's name, and the reasons of known ones that are not. No torch."""

from __future__ import annotations

from offmoe.checkpoint.gguf import attention as gguf_attention
from offmoe.checkpoint.gguf import hybrid as gguf_hybrid
from offmoe.checkpoint.gguf import sigmoid as gguf_sigmoid
from offmoe.checkpoint.gguf.architecture import Architecture

ARCHITECTURES: dict[str, Architecture] = {
    **gguf_attention.ARCHITECTURES, **gguf_sigmoid.ARCHITECTURES, **gguf_hybrid.ARCHITECTURES,
}  # fmt: skip

REFUSED: dict[str, str] = {
    "clip": "it is a vision projector (mmproj) and no language model; name the model's own file",
    "deepseek": "transformers has no class of the first DeepSeek MoE; use llama.cpp",
    "arctic": "transformers has no class of Snowflake Arctic; use llama.cpp",
    "mimo2": "layers of two head sizes are not read from GGUF; use the safetensors version",
    "gemma4": "its layers of two head sizes and their scales are not read from GGUF; use the safetensors version",
    "nemotron_h_moe": "its Mamba layers are not read from GGUF; use the safetensors version",
    "granitehybrid": "its Mamba layers are not read from GGUF; use the safetensors version",
    "jamba": "its Mamba layers are not read from GGUF; use the safetensors version",
    "afmoe": "its gated attention is not read from GGUF; use the safetensors version",
    "exaone-moe": "its sliding windows are not read from GGUF; use the safetensors version",
    "glm-dsa": "its sparse attention is not read from GGUF; use the safetensors version",
    "smallthinker": "transformers has no class of SmallThinker; use llama.cpp",
    "grovemoe": "transformers has no class of GroveMoE; use llama.cpp",
    "step35": "transformers has no class of Step 3.5; use llama.cpp",
}
