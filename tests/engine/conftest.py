"""The engine fixtures, for the tests in this folder."""

from support.engine_fixtures import make_engine, tiny, tiny_of, tiny_text
from support.process_harness import faulty, nothing_left, preloaded_workers

__all__ = ["faulty", "make_engine", "nothing_left", "preloaded_workers", "tiny", "tiny_of", "tiny_text"]
