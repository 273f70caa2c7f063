"""Rows of keys and values: written in place, cut, kept for the next prompt. Knows transformers' caches, no experts."""
