"""The order in which a model is made: config, index, weights, memory, tiers, doors. Knows rooms below, no text."""
