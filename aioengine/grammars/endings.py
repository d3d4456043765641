"""Explains how a grammar's process ended, for its requests."""

from __future__ import annotations

import signal

from aioengine.errors import AioEngineError, EngineOverloaded, RequestInvalid
from aioengine.grammars.limits import GrammarLimits, MiB


class TooMuch(RequestInvalid):
    """The grammar exceeded its limits."""


class TooLong(AioEngineError):
    """The compile was stopped because it exceeded its processor time."""


class Lost(AioEngineError):
    """A process ended for a reason other than its grammar."""


def compile_error(status: int | None, seconds: float, limits: GrammarLimits) -> AioEngineError:
    if status in (-signal.SIGPROF, -signal.SIGXCPU):
        return TooLong(f"the grammar takes more than {seconds:g} s of processor time to compile")
    if status == -signal.SIGABRT:
        return TooMuch(f"the grammar takes more than {limits.memory // MiB} MiB to compile")
    if status in (-signal.SIGSEGV, -signal.SIGBUS):
        return TooMuch("the grammar is nested too deeply to be compiled: its compiler's stack is full")
    return Lost(f"the process that compiled the grammar was lost (status {status})")


OF_ITS_DOING = (0, -signal.SIGPROF, -signal.SIGABRT, -signal.SIGSEGV, -signal.SIGBUS)
"""Exit statuses that the grammar caused, by exceeding a limit or otherwise."""


def mask_error(status: int | None, limits: GrammarLimits) -> str:
    if status == -signal.SIGPROF:
        return f"the grammar takes more than {limits.mask_seconds:g} s of processor time for a token"
    if status == -signal.SIGABRT:
        return f"the grammar takes more than {limits.memory // MiB} MiB"
    if status in (-signal.SIGSEGV, -signal.SIGBUS):
        return "the grammar is nested too deeply: its parser's stack is full"
    return "the process that follows the grammar was lost; try again"


def outcome_name(found: object) -> str:
    """Return the outcome of a compile, as named in the metrics."""
    if isinstance(found, TooMuch):
        return "limit"
    if isinstance(found, RequestInvalid):
        return "invalid"
    if isinstance(found, EngineOverloaded):
        return "overloaded"
    return "failed" if isinstance(found, AioEngineError) else "compiled"
