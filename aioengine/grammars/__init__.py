"""Guided decoding's grammars: compiled and followed in one process beside the engine, which can be killed.

A grammar is a program that a client wrote. It may take for ever to compile, all memory, or the stack, and
its masks may be slow. So the engine's process never runs one. The worker process tries each new text in a
child first, which the system ends at its bounds; what has passed is compiled in the worker, within
llguidance's limits, and its masks are computed there.
"""
