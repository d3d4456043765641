"""The engine and server fixtures, for the tests in this folder."""

from support.engine_fixtures import make_engine, tiny, tiny_of, tiny_text
from support.server_fixtures import serve

__all__ = ["make_engine", "serve", "tiny", "tiny_of", "tiny_text"]
