"""Bytes, counted before they are taken, from a model's widths. Knows the numbers of configs, no tensors."""
