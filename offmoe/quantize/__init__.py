"""A smaller checkpoint, or a rearranged one, from a published one. Knows files and formats, no engine."""
