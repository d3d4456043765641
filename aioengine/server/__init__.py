"""The engine over an OpenAI-compatible HTTP API (extra ``server``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aioengine.server.settings import ServerSettings, parse_keys

if TYPE_CHECKING:
    from aioengine.server.app import ServerApp, create_app

__all__ = ["ServerApp", "ServerSettings", "create_app", "parse_keys"]


def __getattr__(name: str) -> Any:
    """Import the application on first access, because it needs Starlette."""
    if name not in ("ServerApp", "create_app"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from aioengine.server import app
    except ImportError as error:
        raise ImportError(
            f"the server needs more packages: pip install 'aioengine[server]' ({error})"
        ) from error
    return getattr(app, name)
