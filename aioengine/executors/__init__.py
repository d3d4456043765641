"""Devices, and what they are built from: they run model steps off the event loop's thread."""
