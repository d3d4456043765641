"""Describes errors that the code of a policy has raised."""

from __future__ import annotations


def error_text(error: BaseException) -> str:
    """Return the error's type and message. The message is made by the policy's code, so it may raise too."""
    name = type(error).__name__
    try:
        return f"{name}: {error}"
    except BaseException as second:  # a CancelledError that nobody has asked for, too
        if isinstance(second, (KeyboardInterrupt, SystemExit)):
            raise
        return f"{name} (its message raises {type(second).__name__})"
