"""Predictions before anything is loaded: what fits, and how fast. Knows headers and costs, never an engine."""
