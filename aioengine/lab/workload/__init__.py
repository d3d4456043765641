"""Workloads: which requests arrive when, for which adapter."""
