"""Fixtures of the adapters' tests."""

from support.engine_fixtures import tiny, tiny_of

__all__ = ["tiny", "tiny_of"]
