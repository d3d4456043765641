"""API keys: who is asking."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from aioengine.server.errors import ApiError


class Identity(NamedTuple):
    """Who is asking."""

    tenant: str | None = None
    """None if no key was asked for, or none that is known was given."""
    is_admin: bool = False
    """May load and unload adapters."""


class Authenticator:
    """Knows keys by their digests. Every key is compared, in constant time, whichever is presented.

    Keys come as ``Authorization: Bearer KEY``; or as the password of Basic, which is what a browser can
    send for the live page.

    Args:
        tenants: Key -> tenant. Empty: anybody is let in.
        admins: Key -> tenant of those that alone may load and unload adapters, and whatever else the
            others may. Empty: all who are let in are admins.
    """

    def __init__(self, tenants: Mapping[str, str], admins: Mapping[str, str] | None = None) -> None:
        admins = admins or {}
        self._known = [
            *((_digest(key.encode()), Identity(tenant, not admins)) for key, tenant in tenants.items()),
            *((_digest(key.encode()), Identity(tenant, True)) for key, tenant in admins.items()),
        ]
        self._anybody = None if tenants else Identity(None, not admins)

    @property
    def is_open(self) -> bool:
        """Anybody is let in, if not to everything."""
        return self._anybody is not None

    def identify(self, headers: Iterable[tuple[bytes, bytes]]) -> Identity:
        """Whose key is in a request's headers. Raises ApiError if it is none, and one is asked for."""
        presented = next((value for name, value in headers if name.lower() == b"authorization"), None)
        key = None if presented is None else _key(presented)
        found = self._anybody
        if key is not None:
            digest = _digest(key)
            for known, identity in self._known:
                if hmac.compare_digest(known, digest):
                    found = identity  # that of an admin, who comes last, if it is both
        if found is None and key is None:
            raise _refusal("You didn't provide an API key. Send it as 'Authorization: Bearer KEY'.")
        if found is None:
            raise _refusal("Incorrect API key provided.")
        return found


def check_admin(identity: Identity) -> None:
    """Raises ApiError unless it is an admin's."""
    if identity.is_admin:
        return
    if identity.tenant is None:
        raise _refusal("An admin key is needed. Send it as 'Authorization: Bearer KEY'.")
    raise ApiError(
        403,
        "this API key may not load or unload adapters: that takes one of the server's admin keys",
        type="permission_error",
        code="admin_key_required",
    )


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


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


def _refusal(message: str) -> ApiError:
    challenge = 'Bearer realm="aioengine", Basic realm="aioengine"'
    return ApiError(401, message, code="invalid_api_key", challenge=challenge)


def check_host(headers: Iterable[tuple[bytes, bytes]], allowed: frozenset[str]) -> None:
    """Raises ApiError if the request is addressed to a host that is not ``allowed``; all are if that is
    empty."""
    if not allowed:
        return
    host = next((value for name, value in headers if name.lower() == b"host"), b"").decode("latin-1")
    name = host[: host.find("]") + 1] if host.startswith("[") else host.partition(":")[0]
    if name.lower() not in allowed:
        raise ApiError(
            403,
            f"this server does not answer for the host {name!r}; start it with --allowed-host or API keys",
            type="permission_error",
            code="host_not_allowed",
        )
