"""GGUF files under the names and numbers of published safetensors. Knows metadata and byte ranges, no torch."""
