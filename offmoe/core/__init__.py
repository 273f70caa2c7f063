"""Words that every room shares: keys, errors, units, counters, configuration, folders. Knows no torch and no room."""
