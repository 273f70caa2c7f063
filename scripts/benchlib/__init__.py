"""What scripts/make_checkpoint.py and scripts/bench are made of; not part of the package."""
