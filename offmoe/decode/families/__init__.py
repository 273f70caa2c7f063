"""Families of the fused step as data: what their layers are, read from a config. Knows specs, no weights."""
