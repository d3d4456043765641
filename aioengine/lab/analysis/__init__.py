"""Figures computed from the rows of a run: summary, fairness, statistics."""
