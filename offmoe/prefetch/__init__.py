"""Fetches ahead of time: requests, their confidence, and when they are taken back. Knows keys, no transformers."""
