"""Adapters that come from no folder: given in memory, and mixes of others."""
