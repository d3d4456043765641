"""Fixtures of the fleet's tests."""

from support.engine_fixtures import tiny_of, tiny_text

__all__ = ["tiny_of", "tiny_text"]
