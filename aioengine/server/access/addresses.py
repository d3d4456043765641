"""Clients by their addresses."""

from __future__ import annotations

from collections.abc import MutableMapping
from ipaddress import IPv6Address, ip_address
from typing import Any


def client_of(scope: MutableMapping[str, Any]) -> str:
    """Who sends a request, as :func:`network_of` has it; behind a trusted proxy, that proxy's client."""
    client = scope.get("client")
    return network_of(str(client[0])) if client else "unknown"


def network_of(client: str) -> str:
    """The address; of an IPv6 one the first 64 bits, since who has one has all that begin alike."""
    try:
        address = ip_address(client)
    except ValueError:
        return client[:64]
    if address.version == 4 or address.ipv4_mapped:
        return client
    return f"{IPv6Address(int(address) >> 64 << 64)}/64"
