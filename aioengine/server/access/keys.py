"""The keys file: for each key its tenant, its scopes, the adapters it may use, and its limits.

The file holds no key, only each key's SHA-256. A slow hash such as scrypt would protect a password that
people choose, because an attacker who has the file tries likely ones. :func:`new_key` draws 256 random bits:
nobody can try those, however fast the hash is, and one SHA-256 per request costs about a microsecond.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import re
import secrets
import tomllib
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal, get_args

import msgspec
from msgspec import Meta

from aioengine.adapters.read_threads import start_read
from aioengine.checks import nearest
from aioengine.errors import ConfigError

logger = logging.getLogger("aioengine.server")

Scope = Literal["metrics", "generate", "adapters", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
POLL_SECONDS = 1.0
SLOW_SECONDS = 10.0
"""A read of the file that takes longer is complained about: meanwhile no key can be revoked."""

_UNKNOWN = re.compile("Object contains unknown field `([^`]*)`")
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
    scopes: Annotated[tuple[Scope, ...], Meta(min_length=1)] = ("generate",)
    """"admin" includes the others."""
    adapters: tuple[Annotated[str, Meta(min_length=1)], ...] = ("*",)
    """Names of adapters, or patterns with ``*``, ``?`` and ``[...]``; ``*`` matches slashes too."""
    base_model: bool = True
    """Whether the key may use the base model by itself."""
    expires: Annotated[datetime, Meta(tz=True)] | None = None
    """Time from which on the key is invalid."""
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        if _HASH.fullmatch(self.hash) is None:  # not shown: somebody may have written the key itself
            raise ConfigError(
                "hash: must be 'sha256:' and 64 digits 0-9a-f; `aioengine keys new` makes it, with its key"
            )
        if not self.tenant.isprintable():
            raise ConfigError(f"tenant={self.tenant!r}: must be printable text")


class KeysFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All keys, and the limits that a tenant's keys share."""

    keys: tuple[KeyEntry, ...]
    tenants: dict[str, TenantLimits] = {}

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
    try:
        values = tomllib.loads(data.decode("utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{source}: is not valid TOML: {error}") from error
    try:
        return msgspec.convert(values, KeysFile)
    except msgspec.ValidationError as error:
        text, _, place = str(error).rpartition(" - at `$")
        place, what = place.rstrip("`").removeprefix("."), text or str(error)
        if unknown := _UNKNOWN.match(what):
            structs = (KeysFile, KeyEntry, TenantLimits)
            known = [field for struct in structs for field in struct.__struct_fields__]
            what = f"unknown field {unknown[1]!r}{nearest(unknown[1], known)}"
        elif what.startswith("Invalid enum value"):  # nothing else is one of a few texts
            what += f"; there are {', '.join(SCOPES)}"
        raise ConfigError(f"{source}: {place}{': ' if place else ''}{what}") from error


def read_keys_file(path: Path, parse: Callable[..., KeysFile] = parse_keys_file) -> KeysFile:
    """Read a keys file. Raises ConfigError if it cannot be read or is not valid."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"keys file {path}: cannot be read: {error.strerror}") from error
    return parse(content, source=f"keys file {path}")


def new_key() -> str:
    """Generate a key of 256 random bits."""
    return f"aio-{secrets.token_urlsafe(32)}"


class KeysWatch:
    """Watches the keys file. Reads ``path`` at once and passes its content to ``use``; raises ConfigError if
    that fails.

    While :meth:`run` runs, each change is passed to ``use`` within about ``POLL_SECONDS``. A file that is
    broken, missing, or on a disk that hangs leaves the keys as they were, and the log says why.
    """

    def __init__(self, path: str, use: Callable[[KeysFile], None]) -> None:
        self._path, self._use = Path(path), use
        # The same object as long as the file's content is the same.
        parse = functools.lru_cache(1)(parse_keys_file)
        self._read = functools.partial(read_keys_file, self._path, parse)
        self._in_use = self._read()
        self._complaint = ""
        """Why the keys in use are not those of the file; empty if they are."""
        use(self._in_use)

    @property
    def good(self) -> bool:
        """Whether the keys in use are those of the file."""
        return not self._complaint

    async def run(self) -> None:
        """Check until cancelled, in a thread that can be abandoned, because the file's disk may hang. There
        is one such thread at a time."""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            try:
                reading = start_read("aioengine-keys", self._read)
                if not (await asyncio.wait({reading}, timeout=SLOW_SECONDS))[0]:
                    self._complain(f"reading keys file {self._path} takes longer than {SLOW_SECONDS:g} s")
                found = await reading
                if found is not self._in_use:
                    self._use(found)
                    self._in_use = found
                    logger.info("read %s again: %d keys", self._path, len(found.keys))
                self._complaint = ""
            except Exception as error:  # whatever fails, the next check reads the file again
                self._complain(str(error) if isinstance(error, ConfigError) else f"{self._path}: {error!r}")

    def _complain(self, text: str) -> None:
        if text != self._complaint:
            self._complaint = text
            logger.error("the keys stay as they were: %s", text)
