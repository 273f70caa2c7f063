"""Kernels for devices, over a slab of slots. Knows slot numbers, no cache and no model."""
