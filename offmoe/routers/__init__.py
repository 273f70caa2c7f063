"""The way a model routes, and the questions that lookahead asks. Knows modules, no cache of experts."""
