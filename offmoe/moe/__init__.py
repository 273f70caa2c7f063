"""One MoE layer: look up, place, fetch, compute, combine. Knows slots, choices and rows, no transformers."""
