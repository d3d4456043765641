"""Holding a scheduling policy to its contract: random events, and what comes of them."""
