"""Metric families: their definitions, storage, labels and text format."""
