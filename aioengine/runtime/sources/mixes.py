"""Mixes: requests that name several adapters with weights, or one with a scale.

A mix is made when a request first asks for it, of the versions that were current then. It is an adapter like
any other, read from its parts in the CPU cache or, where these are not there, from their files; and it
belongs to the tenant that asked for it last. A scale is a number of the request alone, unless the adapter has
gains or shifts (DoRA, biases): then it is a mix of one."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Mapping, Sequence

from aioengine.adapters.peft.held import HeldAdapter
from aioengine.core.adapters.residency import Residency
from aioengine.core.state import AdapterEntry, Owner
from aioengine.errors import AdapterError, AdapterInvalid, EngineOverloaded
from aioengine.info import mix_name
from aioengine.runtime.sources.names import AdapterNames
from aioengine.step import MixFiles, MixPart

MAX_MIXES = 64
"""Maximum number of mixes of one tenant that are known at a time."""
MAX_KEPT = 256
"""Number of mixes of all tenants above which the oldest that no request uses are removed."""


class Mix:
    """The files of a mix. It keeps the memory of parts that were given in memory."""

    def __init__(self, name: str, parts: Sequence[tuple[AdapterEntry, float]]) -> None:
        self.name = name
        self.parts = parts
        self._held = [held_of(entry) for entry, _ in parts]

    @property
    def files(self) -> MixFiles:
        parts = []
        for (entry, weight), held in zip(self.parts, self._held, strict=True):
            files, digest = None if held is None else held.files, entry.digest or entry.expected
            parts.append(MixPart(entry.label, entry.path, weight, digest, files, entry.uid))
        return MixFiles(tuple(parts))


def held_of(entry: AdapterEntry) -> HeldAdapter | None:
    """Return the memory that an adapter was given in; None if that is a folder. Raises AdapterInvalid for a
    mix."""
    if isinstance(entry.files, Mix):
        raise AdapterInvalid("a mix has no versions: load its parts", name=entry.label)
    assert entry.files is None or isinstance(entry.files, HeldAdapter)
    return entry.files


def parts_of(entry: AdapterEntry) -> list[AdapterEntry]:
    """Return the parts of a mix; of any other adapter itself."""
    return [part for part, _ in entry.files.parts] if isinstance(entry.files, Mix) else [entry]


class Mixes:
    """Makes mixes, keeps them, and counts each for the tenant that asked for it last. (Those of all tenants
    that are in use have no bound, because each has a request, and requests have bounds.)"""

    def __init__(self, names: AdapterNames, residency: Residency) -> None:
        self._names = names
        self._residency = residency
        self._table = names.table
        self._known: dict[str, AdapterEntry] = {}
        """The one that was asked for least recently is first."""
        self._made = 0

    async def acquire(
        self, weights: str | Mapping[str, float], tenant: str | None, now: float
    ) -> tuple[AdapterEntry, float]:
        """Return the mix, or the only adapter, and what that is multiplied by. A mix that is not known is
        made first. Raises as the look-up of its parts does, and EngineOverloaded if its tenant has too many
        other mixes in use."""
        if isinstance(weights, str):
            return await self._names.acquire(weights, tenant), 1.0
        parts: dict[str, AdapterEntry] = {}
        while wanted := [name for name in weights if not self._is_up_to_date(name, parts)]:
            parts[wanted[0]] = await self._names.acquire(wanted[0], tenant)
            await self._read(parts[wanted[0]])
        found: dict[AdapterEntry, float] = defaultdict(float)
        for name, weight in weights.items():  # one may be named with its version and without
            found[parts[name]] += weight
        if len(found) == 1 and parts[next(iter(weights))].scalable:
            [(only, scale)] = found.items()
            return only, scale
        # Two versions of one adapter are in the order of their content: each engine counts its own.
        ordered = sorted(found.items(), key=lambda part: (part[0].label, part[0].digest, part[1]))
        name = mix_name((f"{entry.label}@{entry.version}", weight) for entry, weight in ordered)
        self._table.of(name).check_worth_a_try(now)
        known = self._known.get(name)
        if known is None or known.retired or known.owner != Owner(tenant):
            self._make_room(tenant, now)
        known = self._known.pop(name, None) or self._declare(Mix(name, ordered), now)
        known.owner = Owner(tenant)
        self._known[name] = known
        return known, 1.0

    async def _read(self, part: AdapterEntry) -> None:
        """Wait until a part has been read, if it never was: only then it is known what it is made of."""
        try:
            await self._names.read(part, now=False)
        except AdapterError:
            if isinstance(part.error, AdapterError):
                self._table.of(part.label).fail(part.error, asyncio.get_running_loop().time())
            raise

    def _declare(self, mix: Mix, now: float) -> AdapterEntry:
        """Make a mix known. Its size is about that of its parts together."""
        self._made += 1
        name = self._table.of(mix.name)
        entry = name.declare("mix:" + mix.name, files=mix, number=self._made)
        parts = parts_of(entry)
        self._residency.set_size(entry, sum(e.nbytes for e in parts), sum(e.slot_nbytes for e in parts))
        name.replace(entry, now)
        return entry

    def _is_up_to_date(self, name: str, parts: Mapping[str, AdapterEntry]) -> bool:
        """Whether what a name stands for is among ``parts``. While another is looked up, it may be replaced,
        which a name with a version allows, or unloaded."""
        entry = parts.get(name)
        return (
            entry is not None and entry.uid in self._residency.entries and ("@" in name or not entry.retired)
        )

    def forget(self, label: str, now: float) -> None:
        """Retire all mixes that contain this adapter, because it is being unloaded."""
        for name, entry in list(self._known.items()):
            if any(part.label == label for part in parts_of(entry)):
                self._retire(name, now)

    def _make_room(self, tenant: str | None, now: float) -> None:
        """Drop what is outdated, and make room for one more mix of a tenant. Raises EngineOverloaded if all
        of its own are in use."""
        for name, entry in list(self._known.items()):
            if entry.retired or (any(part.retired for part in parts_of(entry)) and not _is_used(entry)):
                self._retire(name, now)
        own = [name for name, entry in self._known.items() if entry.owner == Owner(tenant)]
        idle = [name for name, entry in self._known.items() if not _is_used(entry)]
        excess = len(self._known) - MAX_KEPT + 1
        if len(own) >= MAX_MIXES:
            idle, excess = [name for name in own if name in idle], 1
            if not idle:
                who = "requests without a tenant have" if tenant is None else f"tenant {tenant!r} has"
                raise EngineOverloaded(
                    f"{who} {MAX_MIXES} mixes of adapters in use, which is the maximum; try again later"
                )
        for name in idle[: max(0, excess)]:
            self._retire(name, now)

    def _retire(self, name: str, now: float) -> None:
        entry = self._known.pop(name)
        if not entry.retired:
            self._table.of(name).retire(entry, now)


def _is_used(entry: AdapterEntry) -> bool:
    return bool(entry.running or entry.waiting)
