"""The tiny model with a tokenizer, for the tests in this folder."""

from support.engine_fixtures import make_engine, tiny_text
from support.server_fixtures import serve

__all__ = ["make_engine", "serve", "tiny_text"]
