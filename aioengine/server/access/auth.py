"""API keys: identify the client, and what it may use."""

from __future__ import annotations

import base64
import binascii
import fnmatch
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from aioengine.server.access.keys import KeyEntry, Scope, hash_key
from aioengine.server.access.limits import Meter
from aioengine.server.errors import ApiError

_WILD = re.compile(r"[*?\[]")


class AllowedModels:
    """The models that a key may use.

    Args:
        adapters: Names, or patterns with ``*``, ``?`` and ``[...]``.
        base_model: Whether the base model is allowed by itself.
    """

    def __init__(self, adapters: Sequence[str] = ("*",), base_model: bool = True) -> None:
        self._base_model = base_model
        self._all = "*" in adapters
        self._names = frozenset(name for name in adapters if _WILD.search(name) is None)
        patterns = [fnmatch.translate(name) for name in adapters if _WILD.search(name) is not None]
        self._patterns = re.compile("|".join(patterns)) if patterns and not self._all else None

    def allow(self, adapter: str | None) -> bool:
        """Whether the adapter is allowed; None is the base model."""
        if adapter is None:
            return self._base_model
        if self._all or adapter in self._names:
            return True
        return self._patterns is not None and self._patterns.match(adapter) is not None


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

    def may(self, scope: Scope) -> bool:
        return scope in self.scopes or "admin" in self.scopes


class Authenticator:
    """Knows keys by their hashes.

    A key is looked up by its hash. The time of the look-up may reveal something about the hashes, but nobody
    can construct a key with a chosen hash.

    Keys come as ``Authorization: Bearer KEY``; as ``x-api-key: KEY``, which is what Anthropic's clients send;
    or as the password of Basic, which is what a browser can send for the live page.

    Args:
        entries: The keys.
        meters: A key's meters.
        anybody: Identity of clients without a key; None if a key is required.
        adapter_meters: Adapter -> meter on which all requests for that adapter count.
    """

    def __init__(
        self,
        entries: Iterable[KeyEntry],
        meters: Callable[[KeyEntry], tuple[Meter, ...]],
        anybody: Identity | None = None,
        adapter_meters: Mapping[str, Meter] | None = None,
    ) -> None:
        self._anybody = anybody
        self._known = {
            entry.hash: Identity(
                entry.tenant,
                frozenset(entry.scopes),
                AllowedModels(entry.adapters, entry.base_model),
                meters(entry),
                None if entry.expires is None else entry.expires.timestamp(),
                entry.hash,
                adapter_meters or {},
            )
            for entry in entries
        }

    @property
    def is_open(self) -> bool:
        """Whether clients without a key are accepted, at least for some routes."""
        return self._anybody is not None

    def identify(self, headers: Iterable[tuple[bytes, bytes]]) -> Identity:
        """Identify the client by the key in its headers. Raises ApiError without a valid key where one is
        required."""
        key = _presented(headers)
        found = None if key is None else self.of_hash(hash_key(key))
        if found is not None:
            return found
        if self._anybody is not None:
            return self._anybody
        if key is None:
            raise refusal("You didn't provide an API key. Send it as 'Authorization: Bearer KEY'.")
        raise refusal("Incorrect API key provided.")

    def of_hash(self, key: str) -> Identity | None:
        """Return the identity whose key has this hash; None if it is unknown or expired."""
        found = self._known.get(key)
        return found if found is not None and (found.expires is None or time.time() < found.expires) else None


def _presented(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    found: bytes | None = None
    for name, value in headers:
        if name.lower() == b"authorization":
            return _key(value)
        if name.lower() == b"x-api-key":
            found = value.strip() or None
    return found


def _key(header: bytes) -> bytes | None:
    scheme, _, rest = header.strip().partition(b" ")
    rest = rest.strip()
    if scheme.lower() == b"bearer":
        return rest or None
    if scheme.lower() == b"basic":
        try:
            return base64.b64decode(rest, validate=True).partition(b":")[2] or None
        except binascii.Error:
            return None
    return None


def refusal(message: str) -> ApiError:
    challenge = 'Bearer realm="aioengine", Basic realm="aioengine"'
    return ApiError(401, message, code="invalid_api_key", challenge=challenge)
