"""Executors run model steps somewhere else than on the event loop's thread."""
