"""API keys: identify the client, and what it may use."""

from __future__ import annotations

import base64
import binascii
import fnmatch
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from aioengine.server.access.keys import Scope
from aioengine.server.access.limits import Meter

_WILD = re.compile(r"[*?\[]")


class AllowedModels:
    """The models that a key may use.

    Args:
        adapters: Names, or patterns with ``*``, ``?`` and ``[...]``.
        base_model: Whether the base model is allowed by itself.
    """

    def __init__(self, adapters: Sequence[str] = ("*",), base_model: bool = True) -> None:
        self._base_model = base_model
        self._names = frozenset(name for name in adapters if _WILD.search(name) is None)
        patterns = [fnmatch.translate(name) for name in adapters if _WILD.search(name) is not None]
        self._patterns = re.compile("|".join(patterns) or "(?!)")

    def allow(self, adapter: str | None) -> bool:
        """Whether the adapter is allowed; None is the base model."""
        if adapter is None:
            return self._base_model
        return adapter in self._names or self._patterns.match(adapter) is not None


class Identity(NamedTuple):
    """The client that sends a request."""

    tenant: str | None = None
    """Tenant of the key; None without a known key."""
    scopes: frozenset[str] = frozenset()
    models: AllowedModels = AllowedModels()
    meters: tuple[Meter, ...] = ()
    """The meters that its requests count on."""
    expires: float | None = None
    """Unix time."""
    key: str | None = None
    """The key's hash; None without a key."""
    adapter_meters: Mapping[str, Meter] = {}
    """Meters by adapter; all requests for an adapter count on one."""

    @property
    def is_valid(self) -> bool:
        """Whether its key has not expired."""
        return self.expires is None or time.time() < self.expires

    def may(self, scope: Scope) -> bool:
        return scope in self.scopes or "admin" in self.scopes


def presented_key(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    """Return the key that a request has: as ``Authorization: Bearer KEY``; as ``x-api-key: KEY``, which is
    what Anthropic's clients send; or as the password of Basic, which is what a browser can send for the live
    page."""
    found: bytes | None = None
    for name, value in headers:
        if name.lower() == b"authorization":
            scheme, _, rest = value.strip().partition(b" ")
            if scheme.lower() == b"bearer":
                return rest.strip() or None
            if scheme.lower() != b"basic":
                return None
            try:
                return base64.b64decode(rest.strip(), validate=True).partition(b":")[2] or None
            except binascii.Error:
                return None
        if name.lower() == b"x-api-key":
            found = value.strip() or None
    return found
