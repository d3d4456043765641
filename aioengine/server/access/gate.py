"""The gate: every request passes it, and nothing else decides who may do what."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import secrets
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, MutableMapping
from hashlib import blake2b
from typing import Any

from aioengine.errors import EngineStopped
from aioengine.runtime.client import Usage
from aioengine.server.access.addresses import client_of
from aioengine.server.access.auth import Authenticator, Identity, refusal
from aioengine.server.access.keys import SCOPES, KeyEntry, KeysFile, Limits, Scope, TenantLimits, hash_key
from aioengine.server.access.keys_watch import KeysWatch
from aioengine.server.access.limits import Admission, Meter
from aioengine.server.access.refusals import Refusals
from aioengine.server.access.scopes import LIMITED, ROUTES
from aioengine.server.access_log import RequestRecord
from aioengine.server.errors import ApiError
from aioengine.server.settings import ServerSettings

_WITHOUT_ADMIN = frozenset(SCOPES) - {"admin"}


class Gate:
    """Admits requests by their key, its scopes and its limits.

    Raises ConfigError if the keys file is not valid. ``limit_waiting`` is called with each tenant's bound on
    waiting requests whenever the bounds change.
    """

    def __init__(self, settings: ServerSettings, limit_waiting: Callable[[Mapping[str, int]], None]) -> None:
        self._limit_waiting = limit_waiting
        self._new_bounds: Mapping[str, int] | None = None
        """Tenants' bounds on waiting requests that must still be passed on."""
        self._refusals = Refusals()
        self._secret = secrets.token_bytes(16)
        self._pseudonym = functools.lru_cache(4096)(self._pseudonym_of)
        self._meters: dict[tuple[str, str], Meter] = {}
        self._task: asyncio.Task[None] | None = None
        self._watch: KeysWatch | None = None
        self._open: dict[int, tuple[RequestRecord, Collection[Scope]]] = {}
        """Open requests with keys. The key of each must have one of the scopes."""
        self._missing_scope_code = "insufficient_scope"
        if settings.keys_file is None:
            self._use_settings(settings)
        else:
            self._watch = KeysWatch(settings.keys_file, self._use_file, self._end_revoked)

    @property
    def is_open(self) -> bool:
        """Whether clients without a key are accepted, at least for some routes."""
        return self._auth.is_open

    @property
    def keys_file(self) -> KeysWatch | None:
        """The watched keys file, if there is one."""
        return self._watch

    def watch(self) -> None:
        """Watch the keys file from now on until :meth:`close`, and pass on its bounds. Call before each
        request."""
        if self._new_bounds is not None:
            with contextlib.suppress(EngineStopped):  # not started yet: the next request tries again
                self._limit_waiting(self._new_bounds)
                self._new_bounds = None
        if self._watch is not None and self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._watch.run(), name="aioengine-keys")

    def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
        self._refusals.close()

    def identify(self, scope: MutableMapping[str, Any], record: RequestRecord) -> None:
        """Identify the client and write it into ``record``. Raises ApiError without a valid key where one is
        required."""
        try:
            record.identity = self._auth.identify(scope["headers"])
        except ApiError as error:
            raise self._refused(scope, record, error) from None
        record.tenant = record.identity.tenant
        record.owner = record.tenant or f"client-{self._pseudonym(client_of(scope))}"

    def _pseudonym_of(self, address: str) -> str:
        """Return a pseudonym of an address, because readers of the metrics need not know the address."""
        return blake2b(address.encode(), key=self._secret, digest_size=6).hexdigest()

    def admit(self, route: str, scope: MutableMapping[str, Any], record: RequestRecord) -> None:
        """Admit the request to ``route``, a row of :data:`scopes.ROUTES`. Raises ApiError if its key
        has none of the scopes, or has reached a limit."""
        needed = ROUTES[route]
        if needed and not any(map(record.identity.may, needed)):
            names = " or ".join(map(repr, needed))
            if record.identity.tenant is None:
                text = f"A key with the scope {names} is needed. Send it as 'Authorization: Bearer KEY'."
                raise self._refused(scope, record, refusal(text))
            raise ApiError(
                403,
                f"this API key may not do that; use a key with the scope {names}",
                type="permission_error",
                code=self._missing_scope_code,
            )
        if route in LIMITED and (record.identity.meters or record.identity.adapter_meters):
            record.admission = Admission(record.identity.meters, time.monotonic())
        if record.identity.key is not None:
            record.ended = asyncio.get_running_loop().create_future()
            self._open[id(record)] = record, needed

    def leave(self, record: RequestRecord, now: float) -> None:
        """Note that a request was answered or refused; call after each."""
        self._open.pop(id(record), None)
        if record.admission is not None:
            tokens = (record.prompt_tokens or 0) + (record.output_tokens or 0)
            record.admission.end(tokens, now)

    def take_usage(self) -> dict[str, Usage]:
        """Return each meter's usage since the last call, for the other doors of a fleet."""
        found = {}
        for (kind, which), meter in self._meters.items():
            usage = meter.take_usage()
            if usage is not None:
                found[f"{kind} {which}"] = usage
        return found

    def used_elsewhere(self, usage: Mapping[str, Usage]) -> None:
        """Count what the other doors of a fleet have accepted, on those of the meters that exist here too."""
        now = time.monotonic()
        for name, used in usage.items():
            kind, _, which = name.partition(" ")
            meter = self._meters.get((kind, which))
            if meter is not None:
                meter.used_elsewhere(used, now)

    def _end_revoked(self) -> None:
        """End open requests whose keys were removed or lost the scope."""
        for record, needed in list(self._open.values()):
            assert record.identity.key is not None and record.ended is not None
            found = self._auth.of_hash(record.identity.key)
            if found is None:
                why = "the API key was revoked, or has expired, while the request was being answered"
            elif needed and not any(map(found.may, needed)):
                why = "the API key lost the scope for this while the request was being answered"
            elif record.completion_id is not None and not all(map(found.models.allow, record.wanted)):
                why = "the API key lost access to the model while the request was being answered"
            else:
                continue
            if not record.ended.done():
                record.ended.set_result(ApiError(401, why, code="invalid_api_key"))

    def _refused(self, scope: MutableMapping[str, Any], record: RequestRecord, error: ApiError) -> ApiError:
        record.counted = True
        return self._refusals.refuse(client_of(scope), error)

    def _use_settings(self, settings: ServerSettings) -> None:
        """Use keys from flags: admin keys have all scopes; other keys have "adapters" if there is no admin
        key."""
        self._missing_scope_code = "admin_key_required"
        scopes = _WITHOUT_ADMIN - {"adapters"} if settings.admin_keys else _WITHOUT_ADMIN
        anybody = None if settings.api_keys else Identity(scopes=scopes)
        self._auth = Authenticator(_entries(settings, scopes), lambda _entry: (), anybody)

    def _use_file(self, file: KeysFile) -> None:
        """Use keys from a file. Existing meters keep their counts."""
        before, self._meters = self._meters, {}
        now = time.monotonic()

        def meter(kind: str, which: str, name: str, limits: Limits) -> Iterator[Meter]:
            if all(getattr(limits, name) is None for name in Limits.__struct_fields__):
                return
            found = self._meters.get((kind, which)) or before.get((kind, which))
            if found is None:
                found = Meter(name, limits)
            else:
                found.limit(limits, now)
            self._meters[kind, which] = found
            yield found

        def meters(entry: KeyEntry) -> tuple[Meter, ...]:
            shared = file.tenants.get(entry.tenant, TenantLimits())
            return (
                *meter("key", entry.hash, "this API key", entry.limits),
                *meter("tenant", entry.tenant, f"tenant {entry.tenant!r}", shared),
            )

        adapters = {
            name: found
            for name, limits in file.adapters.items()
            for found in meter("adapter", name, f"adapter {name!r}", limits)
        }
        self._auth = Authenticator(file.keys, meters, adapter_meters=adapters)
        bounds = {name: limits.max_waiting for name, limits in file.tenants.items()}
        self._new_bounds = {name: most for name, most in bounds.items() if most is not None}


def _entries(settings: ServerSettings, scopes: Iterable[str]) -> Iterator[KeyEntry]:
    for key, tenant in settings.api_keys.items():
        yield KeyEntry(hash=hash_key(key), tenant=tenant, scopes=tuple(scopes))
    for key, tenant in settings.admin_keys.items():  # last: a key that is both is an admin key
        yield KeyEntry(hash=hash_key(key), tenant=tenant, scopes=("admin",))
