"""The keys file: for each key its tenant, its scopes, the adapters it may use, and its limits.

The file holds no key, only each key's SHA-256. A slow hash such as scrypt would protect a password that
people choose, because an attacker who has the file tries likely ones. :func:`new_key` draws 256 random bits:
nobody can try those, however fast the hash is, and one SHA-256 per request costs about a microsecond.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import tomllib
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import msgspec
from msgspec import Meta

from aioengine.checks import nearest, refuse_unknown
from aioengine.errors import ConfigError

Scope = Literal["metrics", "generate", "adapters", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
MAX_FILE_BYTES = 4 * 2**20
SHORTEST_KEY = 22
"""Characters; 22 random ones out of 64 are 132 bits."""

_HASH = re.compile(r"sha256:[0-9a-f]{64}")
_Count = Annotated[int, Meta(ge=1, le=2**53)]


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits of one key; None is no limit."""

    max_concurrent: _Count | None = None
    """Open requests at once."""
    requests_per_minute: _Count | None = None
    tokens_per_minute: _Count | None = None
    """Prompt and output tokens together."""


class TenantLimits(Limits, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits on all keys of a tenant together."""

    max_waiting: _Count | None = None
    """Requests that wait in the engine, in place of ``EngineConfig.max_waiting_per_tenant``."""


class KeyEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One key. A tenant may have several, so that a new key can be in use before the old one is removed."""

    hash: str
    """"sha256:" and the 64 hexadecimal digits of the key's SHA-256."""
    tenant: Annotated[str, Meta(min_length=1, max_length=255)]
    scopes: tuple[str, ...] = ("generate",)
    """"admin" includes the others."""
    adapters: tuple[str, ...] = ("*",)
    """Names of adapters, or patterns with ``*``, ``?`` and ``[...]``; ``*`` matches slashes too."""
    base_model: bool = True
    """Whether the key may use the base model by itself."""
    expires: Annotated[datetime, Meta(tz=True)] | None = None
    """Time from which on the key is invalid."""
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        if _HASH.fullmatch(self.hash) is None:  # not shown: somebody may have written the key itself
            raise ConfigError(
                "hash: must be 'sha256:' and 64 digits 0-9a-f; `aioengine keys hash` makes it from a key"
            )
        if not self.tenant.isprintable():
            raise ConfigError(f"tenant={self.tenant!r}: must be printable text")
        known = ", ".join(SCOPES)
        if not self.scopes:
            raise ConfigError(f"scopes: is empty; name some of {known}")
        for scope in self.scopes:
            if scope not in SCOPES:
                raise ConfigError(f"scopes: there is no {scope!r}{nearest(scope, SCOPES)}; there are {known}")
        if any(not pattern for pattern in self.adapters):
            raise ConfigError("adapters: contains an empty name; remove it")


class KeysFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All keys, and the limits that a tenant's keys share."""

    keys: tuple[KeyEntry, ...]
    tenants: dict[str, TenantLimits] = {}
    adapters: dict[str, Limits] = {}
    """Limits by adapter. All requests for the adapter count together, whoever sends them."""

    def __post_init__(self) -> None:
        if not self.keys:
            raise ConfigError("has no key; `aioengine keys new` makes one")
        first: dict[str, int] = {}
        for i, entry in enumerate(self.keys):
            if (other := first.setdefault(entry.hash, i)) != i:
                raise ConfigError(f"keys[{i}].hash: is also the hash of keys[{other}]; remove one of them")
        known = sorted({entry.tenant for entry in self.keys})
        for tenant in self.tenants:
            if tenant not in known:
                raise ConfigError(
                    f"tenants.{tenant}: no key has this tenant{nearest(tenant, known)}; add a key or remove "
                    "the limits"
                )


def parse_keys_file(data: bytes, *, source: str) -> KeysFile:
    """Parse the content of a keys file. Raises ConfigError, which names ``source`` and the place, never a
    hash."""
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{source}: has more than {MAX_FILE_BYTES} bytes")
    try:
        values = tomllib.loads(data.decode("utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{source}: is not valid TOML: {error}") from error
    for where, type_, table in _tables(values):
        if isinstance(table, dict):
            refuse_unknown(type_, table, f"{source}{where}")
    try:
        return msgspec.convert(values, KeysFile)
    except msgspec.ValidationError as error:
        text, _, place = str(error).rpartition(" - at `$.")
        where = f"{place.rstrip('`')}: " if text else ""
        what = text or str(error).removesuffix(" - at `$`")
        raise ConfigError(f"{source}: {where}{what}") from error


def read_keys_file(path: Path) -> KeysFile:
    """Read a keys file. Raises ConfigError if it cannot be read or is not valid."""
    source = f"keys file {path}"
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{source}: cannot be read: {error.strerror}") from error
    return parse_keys_file(data, source=source)


def _tables(values: Mapping[str, Any]) -> Iterator[tuple[str, type[msgspec.Struct], Any]]:
    """Yield what should be tables, with their places."""
    yield "", KeysFile, values
    keys = values.get("keys")
    for i, entry in enumerate(keys if isinstance(keys, list) else ()):
        yield f": keys[{i}]", KeyEntry, entry
        if isinstance(entry, dict):
            yield f": keys[{i}].limits", Limits, entry.get("limits")
    for field, type_ in (("tenants", TenantLimits), ("adapters", Limits)):
        named = values.get(field)
        for name, limits in (named if isinstance(named, dict) else {}).items():
            yield f": {field}.{name}", type_, limits


def new_key() -> str:
    """Generate a key of 256 random bits."""
    return f"aio-{secrets.token_urlsafe(32)}"


def hash_key(key: str | bytes) -> str:
    """Return the hash that stands for ``key`` in a keys file."""
    return f"sha256:{hashlib.sha256(key.encode() if isinstance(key, str) else key).hexdigest()}"
