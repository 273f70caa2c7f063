"""The experts that lie in slots: policies, holds, evictions, fetches. Knows keys and bytes, no arithmetic."""
