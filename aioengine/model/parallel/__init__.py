"""Tensor parallelism: which rank holds what, and how ranks exchange results."""
