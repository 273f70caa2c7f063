"""Every GGUF architecture that is read, by llama.cpp's name, and the reasons of known ones that are not. No torch."""

from __future__ import annotations

from offmoe.checkpoint import gguf_attention, gguf_hybrid, gguf_sigmoid
from offmoe.checkpoint.gguf_architecture import Architecture

ARCHITECTURES: dict[str, Architecture] = {
    **gguf_attention.ARCHITECTURES, **gguf_sigmoid.ARCHITECTURES, **gguf_hybrid.ARCHITECTURES,
}  # fmt: skip

REFUSED: dict[str, str] = {
    "clip": "it is a vision projector (mmproj) and no language model; name the model's own file",
}
