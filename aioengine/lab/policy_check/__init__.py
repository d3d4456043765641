"""Checks scheduling policies against their contract, with random events."""
