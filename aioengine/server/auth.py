"""API keys: who is asking."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Iterable, Mapping

from aioengine.server.errors import ApiError


class Authenticator:
    """Knows keys by their digests. Every key is compared, in constant time, whichever is presented.

    Keys come as ``Authorization: Bearer KEY``; or as the password of Basic, which is what a browser can
    send for the live page.
    """

    def __init__(self, tenants: Mapping[str, str]) -> None:
        self._tenants = [(_digest(key.encode()), tenant) for key, tenant in tenants.items()]

    @property
    def is_open(self) -> bool:
        """There are no keys: anybody is let in."""
        return not self._tenants

    def tenant(self, headers: Iterable[tuple[bytes, bytes]]) -> str | None:
        """The tenant of the key in a request's headers; None if no key is asked for. Raises ApiError."""
        if self.is_open:
            return None
        presented = next((value for name, value in headers if name.lower() == b"authorization"), None)
        key = None if presented is None else _key(presented)
        if key is None:
            raise _refusal("You didn't provide an API key. Send it as 'Authorization: Bearer KEY'.")
        digest = _digest(key)
        found: str | None = None
        for known, tenant in self._tenants:
            if hmac.compare_digest(known, digest):
                found = tenant
        if found is None:
            raise _refusal("Incorrect API key provided.")
        return found


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
