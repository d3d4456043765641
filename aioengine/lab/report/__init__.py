"""Figures and HTML pages of runs and comparisons."""
