"""The sub-commands of scripts/bench, a module each: `main(argv)` returns the exit code."""
