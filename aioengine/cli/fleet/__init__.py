"""Fleets of replicas from the command line."""
