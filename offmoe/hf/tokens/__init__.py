"""Tokenizers as transformers makes them, also from GGUF metadata. Knows no model."""
