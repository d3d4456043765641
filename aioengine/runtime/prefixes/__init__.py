"""Pinned prefixes on disk: written when they are computed, and read when a request needs them again."""
