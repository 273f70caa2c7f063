"""The place where a missing expert is computed, by measured costs. Knows counts and seconds, no cache."""
