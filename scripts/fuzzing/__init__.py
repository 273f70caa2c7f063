"""A mutation fuzzer for the files that offmoe reads: inputs, their use, and the rule that they must keep."""
