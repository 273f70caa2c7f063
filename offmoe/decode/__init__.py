"""Decode steps: from one token id to the logits after it. Knows models and kernels, no text and no sampling."""
