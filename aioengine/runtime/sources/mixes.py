"""Mixes: requests that name several adapters with weights, or one with a scale.

A mix is an adapter of its own, made when a request first asks for it: it is read from the files of its
parts, and takes a place in the CPU cache and a slot as others do, so that policies need to know nothing of
it. It is made of the versions that were current when the request came.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from aioengine.core.adapters.residency import Residency
from aioengine.core.state import AdapterEntry, AdapterFiles
from aioengine.errors import AdapterInvalid, EngineOverloaded
from aioengine.step import HeldFiles, MixFiles, MixPart

MAX_MIXES = 64
"""Mixes that are known at a time."""


class Mix:
    """The files of a mix; those of parts that were given in memory are shared until it is released."""

    nbytes = 0

    def __init__(self, parts: list[tuple[AdapterEntry, float]]) -> None:
        self.name = "+".join(f"{entry.label}@{entry.version}*{weight!r}" for entry, weight in parts)
        self.labels = {entry.label for entry, _ in parts}
        self._parts = parts
        self._shared: dict[int, AdapterFiles] = {}

    def hold(self) -> None:
        """Keep the files of parts that were given in memory, until :meth:`release`."""
        self._shared = {e.uid: e.files.share() for e, _ in self._parts if e.files is not None}

    @property
    def files(self) -> MixFiles:
        parts = (
            MixPart(entry.label, entry.path, weight, entry.digest, self._held(entry))
            for entry, weight in self._parts
        )
        return MixFiles(tuple(parts))

    def _held(self, entry: AdapterEntry) -> HeldFiles | None:
        files = self._shared[entry.uid].files if entry.uid in self._shared else None
        return files if isinstance(files, HeldFiles) else None

    def share(self) -> AdapterFiles:
        raise AdapterInvalid("a mix has no versions of its own: load its parts", name=self.name)

    @property
    def outdated(self) -> bool:
        return any(entry.retired for entry, _ in self._parts)

    def release(self) -> None:
        for files in self._shared.values():
            files.release()


class Mixes:
    """``acquire`` finds the version that a name stands for."""

    def __init__(self, residency: Residency, acquire: Callable[..., Awaitable[AdapterEntry]]) -> None:
        self._residency = residency
        self._acquire = acquire
        self._known: dict[str, AdapterEntry] = {}
        """Mixes by name, the least recently asked for first."""
        self._made = 0

    async def acquire(self, weights: Mapping[str, float], tenant: str | None, now: float) -> AdapterEntry:
        """The mix, which is made if it is not known. Raises as the look-up of its parts does, and
        EngineOverloaded if too many others are in use."""
        mix = Mix([(await self._acquire(name, tenant), weight) for name, weight in weights.items()])
        name = mix.name
        self._residency.failures.check(name, now)
        known = self._known.pop(name, None)
        if known is None or known.retired:
            self._make_room(now)
            self._made += 1
            mix.hold()
            known = self._residency.declare(name, "mix:" + name, files=mix, version=self._made)
            self._residency.publish(known, now)
        self._known[name] = known
        return known

    def is_mix(self, entry: AdapterEntry) -> bool:
        return isinstance(entry.files, Mix)

    def forget(self, label: str, now: float) -> None:
        """Make no more of what has this adapter in it: it is being unloaded."""
        for name, entry in list(self._known.items()):
            if isinstance(entry.files, Mix) and label in entry.files.labels:
                self._retire(name, now)

    def _make_room(self, now: float) -> None:
        for name, entry in list(self._known.items()):
            old = isinstance(entry.files, Mix) and entry.files.outdated
            if entry.retired or (old and not entry.running and not entry.waiting):
                self._retire(name, now)
        if len(self._known) < MAX_MIXES:
            return
        idle = next((n for n, entry in self._known.items() if not entry.running and not entry.waiting), None)
        if idle is None:
            raise EngineOverloaded(
                f"{MAX_MIXES} mixes of adapters are in use, which is the maximum; try again later"
            )
        self._retire(idle, now)

    def _retire(self, name: str, now: float) -> None:
        entry = self._known.pop(name)
        if not entry.retired:
            self._residency.retire(entry, now)
