"""The live page: what feeds it, and a server for it alone."""
