"""Families whose experts are not behind transformers' own door: `base` is the contract, `find` the choice."""
