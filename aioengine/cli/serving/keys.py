"""``aioengine keys``: makes API keys for ``serve --keys``."""

from __future__ import annotations

import sys

import msgspec

from aioengine.server.access import clients, keys


def new(*, tenant: str, scope: list[str] | None = None, adapter: list[str] | None = None) -> int:
    """Create a key, and print its entry for the keys file.

    The entry goes to standard output, so that >> adds it to the file. The key itself goes to standard error,
    once, and is not stored.

    Args:
        tenant: Tenant that uses the key.
        scope: metrics, generate, adapters or admin; can be given more than once; generate by default.
        adapter: Adapter, or pattern such as team-a/*, that it may use; any by default.
    """
    key = keys.new_key()
    entry = {"hash": clients.hash_key(key), "tenant": tenant, "scopes": scope or ["generate"]}
    if adapter:
        entry["adapters"] = adapter
    # JSON's texts and lists are TOML's as well.
    lines = [f"{name} = {msgspec.json.encode(value).decode()}" for name, value in entry.items()]
    text = "\n".join(["", "[[keys]]", *lines]).replace("\x7f", "\\u007f")
    keys.parse_keys_file(text.encode(), source="the new entry")
    print(text)
    print(f"the key, which is not shown again: {key}", file=sys.stderr)
    return 0
