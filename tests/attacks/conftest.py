"""The tiny model with a tokenizer, for the tests in this folder."""

from support.engine_fixtures import tiny_text

__all__ = ["tiny_text"]
