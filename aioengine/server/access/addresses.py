"""Identifies clients by their addresses."""

from __future__ import annotations

import functools
from collections.abc import MutableMapping
from ipaddress import IPv6Address, ip_address
from typing import Any


def client_of(scope: MutableMapping[str, Any]) -> str:
    """Identify the client of a request by its network; behind a trusted proxy, the proxy's client."""
    client = scope.get("client")
    return network_of(str(client[0])) if client else "unknown"


@functools.lru_cache(4096)
def network_of(client: str) -> str:
    """Return the address, or the first 64 bits of an IPv6 address, because one client owns all addresses of
    such a network."""
    try:
        address = ip_address(client)
    except ValueError:
        return client[:64]
    if address.version == 4 or address.ipv4_mapped:
        return client
    return f"{IPv6Address(int(address) >> 64 << 64)}/64"
