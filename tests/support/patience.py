"""How long a test waits for something that happens for certain: a guard against waiting for ever, and no measurement.

A busy machine may need minutes for what takes milliseconds, and that is no failure. Nothing waits this long unless it
hangs. Below pytest's own limit (`timeout` in pyproject.toml), so that a test says itself what it waited for.
"""

PATIENCE_S = 400.0
