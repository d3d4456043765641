"""Vectors, labels and scores over HTTP."""
