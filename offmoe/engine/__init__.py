"""Requests: prompts in, text and statistics out, one token after another. Knows a loaded model, no terminal."""
