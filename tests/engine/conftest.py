"""The engine fixtures, for the tests in this folder."""

from support.engine_fixtures import make_engine, tiny, tiny_of, tiny_text
from support.process_harness import faulty, nothing_left

__all__ = ["faulty", "make_engine", "nothing_left", "tiny", "tiny_of", "tiny_text"]
