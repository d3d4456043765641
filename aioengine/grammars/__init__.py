"""Guided decoding's grammars: compiled and followed in separate processes, which can be killed.

A grammar is a program that a client wrote. It may take for ever to compile, all memory, or the stack, and
its masks may be slow. So the engine's process never runs one: a small process without threads (``zygote``)
forks one child for each grammar text, which compiles it and computes the masks of all requests that have it.
"""
