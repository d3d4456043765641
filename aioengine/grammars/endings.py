"""How a grammar's process has ended, and what its requests are told."""

from __future__ import annotations

import signal

from aioengine.errors import AioEngineError, EngineOverloaded, RequestInvalid
from aioengine.grammars.limits import GrammarLimits, MiB


class TooMuch(RequestInvalid):
    """The grammar takes more than its limits."""


class TooLong(AioEngineError):
    """The compile was stopped, for it took more processor time than it was given."""


class Lost(AioEngineError):
    """A process has ended, and not because of the grammar."""


def compile_error(status: int | None, seconds: float, limits: GrammarLimits) -> AioEngineError:
    if status in (-signal.SIGPROF, -signal.SIGXCPU):
        return TooLong(f"the grammar takes more than {seconds:g} s of processor time to compile")
    if status == -signal.SIGABRT:
        return TooMuch(f"the grammar takes more than {limits.memory // MiB} MiB to compile")
    if status in (-signal.SIGSEGV, -signal.SIGBUS):
        return TooMuch("the grammar is nested too deeply to be compiled: its compiler's stack is full")
    return Lost(f"the process that compiled the grammar was lost (status {status})")


OF_ITS_DOING = (0, -signal.SIGPROF, -signal.SIGABRT, -signal.SIGSEGV, -signal.SIGBUS)
"""How the process ends of a grammar that takes too much; and of its own accord."""


def mask_error(status: int | None, limits: GrammarLimits) -> str:
    if status == -signal.SIGPROF:
        return f"the grammar takes more than {limits.mask_seconds:g} s of processor time for a token"
    if status == -signal.SIGABRT:
        return f"the grammar takes more than {limits.memory // MiB} MiB"
    if status in (-signal.SIGSEGV, -signal.SIGBUS):
        return "the grammar is nested too deeply: its parser's stack is full"
    return "the process that follows the grammar was lost; try again"


def outcome_name(found: object) -> str:
    """What a compile came to, as metrics call it."""
    if isinstance(found, TooMuch):
        return "limit"
    if isinstance(found, RequestInvalid):
        return "invalid"
    if isinstance(found, EngineOverloaded):
        return "overloaded"
    return "failed" if isinstance(found, AioEngineError) else "compiled"
