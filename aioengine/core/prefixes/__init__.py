"""Prefixes: those that stay in the cache after their request, and where that of an activated adapter ends."""
