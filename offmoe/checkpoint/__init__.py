"""Published files as tables: headers, the expert index, a writer. Knows bytes and names, no torch."""
