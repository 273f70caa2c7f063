"""MoE families whose experts are not behind transformers' door: `base` is the contract, `find` the factory."""
