"""Rules for browsers: the hosts that a request may name, and the other sites whose pages may call the server.

A browser sends requests of any page to any server that it reaches, with the password that the user has given
there. So pages of other sites must not change anything, unless their origin is allowed.
"""

from __future__ import annotations

import re
from collections.abc import MutableMapping, Sequence
from typing import Any

from aioengine.server.errors import ApiError

_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\[\]:@/?#]*)(?::[0-9]*)?")
"""A name or an address, and maybe a port; nothing may follow."""
_READS = ("GET", "HEAD")
_OTHER_SITES = (b"cross-site", b"same-site")
_VARY = (b"vary", b"origin")
_EXPOSED = (b"access-control-expose-headers", b"retry-after, x-not-enforced, x-request-id")
_MAX_AGE = (b"access-control-max-age", b"600")


class BrowserRules:
    """Checks of each request, and the headers of CORS.

    Args:
        hosts: Names that requests may be addressed to; empty: any.
        origins: Origins of other sites whose pages may call the server.
    """

    def __init__(self, hosts: Sequence[str], origins: Sequence[str]) -> None:
        self._hosts = frozenset(name.lower() for name in hosts)
        self._origins = frozenset(origin.encode() for origin in origins)

    def check(self, scope: MutableMapping[str, Any], *, is_probe: bool) -> None:
        """Raise ApiError for a Host that is not allowed, and for a request of another site's page that does
        more than read. That page cannot see what it reads, unless :meth:`permission` allows it."""
        host = _header(scope, b"host")
        if self._hosts and not is_probe:
            found = _HOST.fullmatch(host.decode("latin-1"))
            if found is None or found[1].lower() not in self._hosts:
                text = f"this server does not answer for the host {_shown(host)}"
                raise _refusal(f"{text}; start it with --allowed-host or API keys", "host_not_allowed")
        if scope["method"] in _READS:
            return
        origin, site = _header(scope, b"origin"), _header(scope, b"sec-fetch-site")
        is_own = not origin or origin.partition(b"://")[2].lower() == host.lower()
        if origin not in self._origins and (site in _OTHER_SITES or not is_own):
            text = f"this server takes no requests from pages of {_shown(origin or site)}"
            raise _refusal(f"{text}; start it with --allow-origin to let them in", "origin_not_allowed")

    def permission(self, scope: MutableMapping[str, Any]) -> list[tuple[bytes, bytes]]:
        """Return the headers of an answer that let an allowed site's page read it."""
        if not self._origins:
            return []
        origin = _header(scope, b"origin")
        allowed = [(b"access-control-allow-origin", origin), _EXPOSED] if origin in self._origins else []
        return [*allowed, _VARY]

    def preflight(self, scope: MutableMapping[str, Any]) -> list[tuple[bytes, bytes]] | None:
        """Return the headers of the answer to a browser that asks whether an allowed site's page may send a
        request; None for all other requests."""
        asked = _header(scope, b"access-control-request-method")
        if scope["method"] != "OPTIONS" or not asked or _header(scope, b"origin") not in self._origins:
            return None
        wanted = _header(scope, b"access-control-request-headers")
        return [
            (b"access-control-allow-methods", asked),
            (b"access-control-allow-headers", wanted),
            _MAX_AGE,
        ]


def _header(scope: MutableMapping[str, Any], name: bytes) -> bytes:
    return next((value for own, value in scope["headers"] if own == name), b"")


def _shown(value: bytes) -> str:
    return repr(value.decode("latin-1")[:300])


def _refusal(text: str, code: str) -> ApiError:
    return ApiError(403, text, code=code)
