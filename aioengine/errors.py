"""Every error that aioengine raises on purpose, all under :class:`AioEngineError`.

A message says what was wrong, where, and what to do about it.
"""

from __future__ import annotations

import copy
from typing import Any, Literal, TypeVar

E = TypeVar("E", bound=BaseException)
Bound = Literal["server", "tenant", "pinned"]
MAX_MESSAGE_BYTES = 2000
"""Maximum bytes of a message in UTF-8; longer ones are cut, because they may quote a client or a file."""
_MAX_REASON_BYTES = 1500


class AioEngineError(Exception):
    """Base of all aioengine errors. A message is never longer than 2,000 bytes, and always valid UTF-8."""

    def __init__(self, message: str = "") -> None:
        super().__init__(_bounded(message, MAX_MESSAGE_BYTES))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the error with its fields, because its ``args`` are not the arguments of its constructor."""
        return type(self).__new__, (type(self), *self.args), self.__dict__


class ConfigError(AioEngineError, ValueError):
    """A configuration value is not valid, or the configuration does not fit the machine."""


class AdapterError(AioEngineError):
    """Base of the adapter errors. ``name`` and ``path`` say which adapter, also in the message; ``transient``
    says whether the same attempt may succeed a little later."""

    def __init__(self, reason: str, *, name: str, path: str | None = None, transient: bool = False) -> None:
        self.name = name
        self.path = path
        self.reason = _bounded(reason, _MAX_REASON_BYTES)
        self.transient = transient
        where = f" ({path})" if path is not None else ""
        super().__init__(f"adapter {name!r}{where}: {self.reason}")


class AdapterNotFound(AdapterError):
    """No adapter is registered under this name, or it is being unloaded."""


class AdapterInvalid(AdapterError):
    """The adapter is malformed, does not fit the base model, or uses an unsupported feature."""


class AdapterConflict(AdapterInvalid):
    """The name stands for other files, or nodes have different ones."""


class AdapterTooLarge(AdapterInvalid):
    """The adapter's rank exceeds ``max_lora_rank``, or its trained tokens do not fit into a slot."""


class AdapterLoadError(AdapterError):
    """The adapter's files could not be read."""


class AdapterChanged(AdapterLoadError):
    """The adapter's files are not those that are expected under its name."""


class RequestInvalid(AioEngineError, ValueError):
    """The request can never run as given: empty or too long prompt, invalid sampling values, ..."""


class PromptTooLong(RequestInvalid):
    """The prompt, of ``tokens`` tokens (or ``at_least`` as many), leaves no room for output."""

    def __init__(self, tokens: int, max_model_len: int, *, at_least: bool = False) -> None:
        self.tokens = tokens
        self.at_least = at_least
        super().__init__(
            f"the prompt has {'at least ' * at_least}{tokens} tokens and max_model_len={max_model_len} "
            "leaves no room for output: shorten it, or raise max_model_len"
        )


class EngineOverloaded(AioEngineError):
    """A bound on waiting requests is reached; try again later. ``bound`` is that of the "server" or of the
    request's "tenant"; "pinned": pinned adapters leave no room for it; None: another."""

    def __init__(self, message: str, *, bound: Bound | None = None) -> None:
        super().__init__(message)
        self.bound = bound


class RequestRejected(AioEngineError):
    """The policy rejected the request before it ran, for its ``reason``; try again later."""

    def __init__(self, message: str, *, reason: str = "") -> None:
        super().__init__(message)
        self.reason = _bounded(reason, _MAX_REASON_BYTES)


class DeadlineExceeded(AioEngineError):
    """The request's deadline passed before it finished."""


class EngineStopped(AioEngineError):
    """The engine is not running: not entered yet, draining, or closed."""


class EngineDead(AioEngineError):
    """The engine hit an internal error and cannot go on; the cause is chained."""


class DeviceError(EngineDead):
    """A GPU, or the exchange between ranks, has failed, and what ran is lost; what torch raised is chained.
    Where the model has processes of its own, ``restart="on-failure"`` starts them again."""


class DeviceOutOfMemory(DeviceError):
    """A step, or the start, needed more memory than the device has left."""


class PolicyError(AioEngineError):
    """A scheduler policy could not be found or built, or broke its contract."""


def frameless(error: E) -> E:
    """Return a copy of an error that several are told of, or that is kept. The error itself would collect the
    tracebacks and the contexts of all who raise it; and tracebacks, its causes' too, keep all that their
    frames hold: the content of a file, the body of a request. One of another package stays as it is, because
    it may refuse to be copied."""
    found = copy.copy(error) if isinstance(error, AioEngineError) else error
    found.__cause__ = error.__cause__
    causes, seen = [error.__cause__], set[int]()
    while causes:
        cause = causes.pop()
        if cause is not None and id(cause) not in seen:
            seen.add(id(cause))
            cause.__traceback__ = None
            causes += [cause.__cause__, cause.__context__]
    return found


def _bounded(text: str, limit: int) -> str:
    """Cut the text to at most ``limit`` bytes of UTF-8; characters that UTF-8 does not have are escaped."""
    data = text[: limit + 1].encode("utf-8", "backslashreplace")
    if len(data) <= limit:
        return data.decode()
    return data[: limit - 3].decode("utf-8", "ignore") + "..."
