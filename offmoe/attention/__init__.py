"""One function behind transformers' attention door: query, rows, result. Knows no cache of experts."""
