"""Finds the replicas, slots and memory that a workload needs for its objectives."""
