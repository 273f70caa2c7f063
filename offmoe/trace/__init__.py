"""The experts that routers chose: a recorder, and the file format. Knows keys and numbers, no cache and no torch."""
