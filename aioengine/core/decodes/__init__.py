"""Decodes that are counted, and not written down one by one."""
