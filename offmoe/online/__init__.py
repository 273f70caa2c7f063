"""Comparison of two settings while a program runs. Knows times and counts, and nothing of what is compared."""
