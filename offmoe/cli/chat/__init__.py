"""`offmoe chat` and `run`: lines in, replies out. Knows the engine by its conversation."""
