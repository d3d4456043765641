"""Adapters on their way: the PEFT format, the CPU cache, and the asynchronous loader."""
