"""Devices, which run model steps off the event loop's thread, and their parts."""
