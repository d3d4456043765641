"""The live page: its feed, and a server for it alone."""
