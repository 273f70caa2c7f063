"""What scripts/make_checkpoint.py and scripts/bench.py are made of; not part of the package."""
