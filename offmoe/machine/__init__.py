"""This computer: memory, processors, control groups, and what it was measured to do. Knows no model."""
