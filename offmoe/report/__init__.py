"""Tables, plots, progress bars and comparisons for people. Knows results, and measures through public doors."""
