"""The engine fixtures, for the tests in this folder."""

from engine_fixtures import make_engine, tiny, tiny_of, tiny_text

__all__ = ["make_engine", "tiny", "tiny_of", "tiny_text"]
