"""Parts of scripts/make_checkpoint.py and scripts/bench; not part of the package."""
