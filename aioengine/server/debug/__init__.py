"""The state of a running server at this moment, for operators."""
