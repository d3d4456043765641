"""Functions in Triton's own language."""
