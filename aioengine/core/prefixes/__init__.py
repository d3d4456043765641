"""Prefixes that stay in the prefix cache after their request has ended."""
