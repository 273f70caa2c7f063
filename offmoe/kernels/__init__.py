"""Products and activations, with a reference for each. Knows tensors and slots, no cache and no model."""
