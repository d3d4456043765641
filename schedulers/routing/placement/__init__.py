"""The built-in placement policies."""
