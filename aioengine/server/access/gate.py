"""The gate: every request passes it, and nothing else decides who may do what."""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b

from aioengine.metrics.page.plumbing import Scope as HttpScope
from aioengine.runtime.client import Usage
from aioengine.server.access.clients import (
    Admission,
    AllowedModels,
    Bucket,
    Identity,
    Meter,
    hash_key,
    presented_key,
)
from aioengine.server.access.keys import SCOPES, KeysFile, KeysWatch, Limits, Scope, TenantLimits
from aioengine.server.access_log import RequestRecord
from aioengine.server.bounds import network_of
from aioengine.server.errors import ApiError
from aioengine.server.settings import ServerSettings

logger = logging.getLogger("aioengine.server")

PER_MINUTE = 60
"""Number of 401 answers per address and minute; further ones are 429."""
MAX_ADDRESSES = 4096
"""Maximum number of addresses; beyond it the one refused longest ago is forgotten."""
LOG_SECONDS = 60.0
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\[\]:@/?#]*)(?::[0-9]*)?")
"""A name or an address, and maybe a port; nothing may follow."""
_CHALLENGE = 'Bearer realm="aioengine", Basic realm="aioengine"'


class Gate:
    """Admits requests by the host that they name, by the site whose page sends them, and by their key, its
    scopes and its limits.

    Keys are looked up by their hashes. The time of the look-up may reveal something about the hashes, but
    nobody can construct a key with a chosen hash.

    Raises ConfigError if the keys file is not valid. ``limit_waiting`` is called with each tenant's bound on
    waiting requests whenever the bounds change.
    """

    def __init__(self, settings: ServerSettings, limit_waiting: Callable[[Mapping[str, int]], None]) -> None:
        self._limit_waiting = limit_waiting
        self._new_bounds: Mapping[str, int] | None = None
        """Tenants' bounds on waiting requests that must still be passed on."""
        self._refusals, self._told = 0, -math.inf
        """Number of refusals for their key since the log told of them, and when it did."""
        self._bucket_of = functools.lru_cache(MAX_ADDRESSES)(lambda address: Bucket(PER_MINUTE))
        self._hosts = frozenset(name.lower() for name in settings.allowed_hosts)
        self._origins = frozenset(origin.encode() for origin in settings.allow_origins)
        hashed = functools.partial(blake2b, key=secrets.token_bytes(16), digest_size=6)
        # In place of addresses, because readers of the metrics need not know those.
        self._pseudonym = functools.lru_cache(4096)(lambda client: hashed(client.encode()).hexdigest())
        self._known: dict[str, Identity] = {}
        """Clients by the hashes of their keys."""
        self._anybody: Identity | None = None
        """Clients without a key; None if a key is required."""
        self._meters: dict[str, Meter] = {}
        """By the same names as in the other gateways of a fleet."""
        self._task: asyncio.Task[None] | None = None
        self.keys_file: KeysWatch | None = None
        """The watched keys file, if there is one."""
        if settings.keys_file is None:
            self._use_settings(settings)
        else:
            self.keys_file = KeysWatch(settings.keys_file, self._use_file)

    @property
    def is_open(self) -> bool:
        """Whether clients without a key are accepted, at least for some routes."""
        return self._anybody is not None

    def watch(self) -> None:
        """Watch the keys file from now on until :meth:`close`, and pass on its bounds. Call before each
        request. Raises EngineStopped if the engine has not started yet."""
        if self._new_bounds is not None:
            self._limit_waiting(self._new_bounds)
            self._new_bounds = None
        if self.keys_file is not None and self._task is None:
            self._task = asyncio.get_running_loop().create_task(self.keys_file.run(), name="aioengine-keys")

    def close(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def check_site(self, scope: HttpScope, *, is_probe: bool) -> None:
        """Raise ApiError for a Host that is not allowed, and for a request of another site's page that does
        more than read: a browser would send it with the password that the user has given here. That page
        cannot see what it reads, unless its origin is allowed."""
        headers = dict(scope["headers"])
        host: bytes = headers.get(b"host", b"")
        if self._hosts and not is_probe:
            found = _HOST.fullmatch(host.decode("latin-1"))
            if found is None or found[1].lower() not in self._hosts:
                text = f"this server does not answer for the host {_shown(host)}"
                text += "; start it with --allowed-host or API keys"
                raise ApiError(403, text, code="host_not_allowed")
        if scope["method"] in ("GET", "HEAD"):
            return
        origin, site = headers.get(b"origin", b""), headers.get(b"sec-fetch-site", b"")
        is_own = not origin or origin.partition(b"://")[2].lower() == host.lower()
        if origin not in self._origins and (site in (b"cross-site", b"same-site") or not is_own):
            text = f"this server takes no requests from pages of {_shown(origin or site)}"
            text += "; start it with --allow-origin to let them in"
            raise ApiError(403, text, code="origin_not_allowed")

    def identify(self, scope: HttpScope, record: RequestRecord) -> None:
        """Identify the client and write it into ``record``. Raises ApiError without a valid key where one is
        required."""
        found = self._anybody
        if self._known or found is None:  # else it does not matter who it is
            key = presented_key(scope["headers"])
            known = None if key is None else self._known.get(hash_key(key))
            found = known if known is not None and known.is_valid else found
        if found is None:
            text = "Incorrect API key provided."
            if key is None:
                text = "You didn't provide an API key. Send it as 'Authorization: Bearer KEY'."
            raise self._refused(scope, record, text)
        record.identity, record.tenant = found, found.tenant
        record.owner = record.tenant or f"client-{self._pseudonym(_client_of(scope))}"

    def admit(self, needed: Sequence[Scope], scope: HttpScope, record: RequestRecord) -> None:
        """Admit the request to a route. Raises ApiError if its key has none of the ``needed`` scopes, or has
        reached a limit: those of keys and tenants are on requests that need "generate"."""
        identity = record.identity
        if needed and identity.scopes.isdisjoint(needed):
            names = " or ".join(map(repr, needed))
            if identity.tenant is None:
                text = f"A key with the scope {names} is needed. Send it as 'Authorization: Bearer KEY'."
                raise self._refused(scope, record, text)
            text = f"this API key may not do that; use a key with the scope {names}"
            raise ApiError(403, text, code="insufficient_scope")
        if needed == ("generate",) and identity.meters:
            record.admission = Admission(identity.meters, time.monotonic())

    def take_usage(self) -> dict[str, Usage]:
        """Return each meter's usage since the last call, for the other gateways of a fleet."""
        found = {name: meter.take_usage() for name, meter in self._meters.items()}
        return {name: usage for name, usage in found.items() if usage is not None}

    def used_elsewhere(self, usage: Mapping[str, Usage]) -> None:
        """Count what the other gateways of a fleet have accepted since the last call, and answer now."""
        for name, meter in self._meters.items():
            meter.used_elsewhere(usage.get(name, Usage()), time.monotonic())

    def _refused(self, scope: HttpScope, record: RequestRecord, text: str) -> ApiError:
        """Return the error for a client without a valid key: a 401 or, after too many of these, a 429. They
        are logged in one line each ``LOG_SECONDS``.

        A valid key is never refused, whatever its address has sent: keys cannot be guessed, so the limit
        protects processor time and the log, not the keys.
        """
        now, address, record.counted = time.monotonic(), _client_of(scope), True
        self._refusals += 1
        if now - self._told >= LOG_SECONDS:
            what = "requests without a valid API key since the last such line"
            logger.warning("refused %d %s; the latest was from %s", self._refusals, what, address)
            self._refusals, self._told = 0, now
        bucket = self._bucket_of(address)
        if wait := math.ceil(bucket.wait(now)):
            text = "too many requests without a valid API key from this address; correct the key"
            return ApiError(429, text, code="too_many_invalid_keys", retry_after=wait, close=True)
        bucket.take(1, now)
        return ApiError(401, text, code="invalid_api_key", challenge=_CHALLENGE)

    def _use_settings(self, settings: ServerSettings) -> None:
        """Use keys from flags: admin keys have all scopes; other keys have "adapters" if there is no admin
        key."""
        scopes = frozenset(SCOPES) - ({"admin", "adapters"} if settings.admin_keys else {"admin"})
        self._anybody = None if settings.api_keys else Identity(scopes=scopes)
        # A key that is both is an admin key.
        for keys, own in ((settings.api_keys, scopes), (settings.admin_keys, frozenset(SCOPES))):
            for key, tenant in keys.items():
                self._known[hash_key(key)] = Identity(tenant, own)

    def _use_file(self, file: KeysFile) -> None:
        """Use keys from a file. A meter whose limits are as before keeps its counts."""
        before, self._meters = self._meters, {}

        def meter(key: str, name: str, limits: Limits) -> tuple[Meter, ...]:
            if all(getattr(limits, field) is None for field in Limits.__struct_fields__):
                return ()
            found = self._meters.get(key) or before.get(key)
            if found is None or found.limits != limits:
                found = Meter(name, limits)
            self._meters[key] = found
            return (found,)

        self._known = {}
        for entry in file.keys:
            tenant = entry.tenant
            limits = file.tenants.get(tenant, TenantLimits())
            shared = meter(f"tenant {tenant}", f"tenant {tenant!r}", limits)
            self._known[entry.hash] = Identity(
                tenant,
                frozenset(SCOPES if "admin" in entry.scopes else entry.scopes),
                AllowedModels(entry.adapters, entry.base_model),
                meter(f"key {entry.hash}", "this API key", entry.limits) + shared,
                None if entry.expires is None else entry.expires.timestamp(),
            )
        bounds = {name: limits.max_waiting for name, limits in file.tenants.items()}
        self._new_bounds = {name: most for name, most in bounds.items() if most is not None}


def _shown(value: bytes) -> str:
    return repr(value.decode("latin-1")[:300])


def _client_of(scope: HttpScope) -> str:
    """Identify the client of a request by its network; behind a trusted proxy, the proxy's client."""
    client = scope.get("client")
    return network_of(str(client[0])) if client else "unknown"
