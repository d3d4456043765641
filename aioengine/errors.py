"""Every error that aioengine raises on purpose, all under :class:`AioEngineError`.

A message says what was wrong, where, and what to do about it. Adapter errors carry the adapter's
``name`` and ``path`` and put both in the message.
"""

from __future__ import annotations

from typing import Literal

Bound = Literal["server", "tenant", "adapter"]


class AioEngineError(Exception):
    """Base of all aioengine errors."""


class ConfigError(AioEngineError, ValueError):
    """A configuration value is not acceptable, or the configuration does not fit the machine."""


class AdapterError(AioEngineError):
    """Base of the adapter errors; ``name`` and ``path`` say which adapter."""

    def __init__(self, reason: str, *, name: str, path: str | None = None) -> None:
        self.name = name
        self.path = path
        self.reason = reason
        where = f" ({path})" if path is not None else ""
        super().__init__(f"adapter {name!r}{where}: {reason}")


class AdapterNotFound(AdapterError):
    """No adapter of this name is registered (or it is being unloaded)."""


class AdapterInvalid(AdapterError):
    """The adapter is malformed, does not fit the base model, or uses an unsupported feature."""


class AdapterTooLarge(AdapterInvalid):
    """The adapter's rank exceeds ``max_lora_rank``."""


class AdapterLoadError(AdapterError):
    """The adapter's files could not be read; ``transient`` says that a retry may succeed."""

    def __init__(self, reason: str, *, name: str, path: str | None = None, transient: bool = False) -> None:
        super().__init__(reason, name=name, path=path)
        self.transient = transient


class RequestInvalid(AioEngineError, ValueError):
    """The request can never run as given: empty or too long prompt, bad sampling values, ..."""


class PromptTooLong(RequestInvalid):
    """The prompt leaves no room for output. ``tokens`` is its length, or, with ``at_least``, a bound on it
    that was enough to refuse the prompt before it was tokenized."""

    def __init__(self, tokens: int, max_model_len: int, *, at_least: bool = False) -> None:
        self.tokens = tokens
        self.at_least = at_least
        has = f"at least {tokens}" if at_least else f"{tokens}"
        super().__init__(
            f"the prompt has {has} tokens and max_model_len={max_model_len} leaves no room for output: "
            "shorten it, or raise max_model_len"
        )


class EngineOverloaded(AioEngineError):
    """As many requests wait as may; try again later.

    ``bound`` says whose bound it is: the server's (``max_waiting``), or that of the request's tenant or
    adapter. A request that has waited can still get it, when another tenant's takes its place: then ``bound``
    is "tenant". None: pinned adapters hold every slot.
    """

    def __init__(self, message: str, *, bound: Bound | None = None) -> None:
        super().__init__(message)
        self.bound = bound


class DeadlineExceeded(AioEngineError):
    """The request's deadline passed before it finished."""


class EngineStopped(AioEngineError):
    """The engine is not running: not entered yet, draining, or closed."""


class EngineDead(AioEngineError):
    """The engine hit an internal error and cannot go on; the cause is chained."""


class PolicyError(AioEngineError):
    """A scheduler policy could not be found or built, or broke its contract."""
