"""Grok-1, which transformers has no class for: a config and a model in its idiom. Knows no expert cache."""
