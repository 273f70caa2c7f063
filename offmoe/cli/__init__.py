"""The command line: parse, call, print. torch and transformers are imported by the commands that need them."""
