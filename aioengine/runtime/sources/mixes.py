"""Mixes: requests that name several adapters with weights, or one with a scale.

A mix is made when a request first asks for it, of the versions that were current then. It is an adapter like
any other, read from its parts in the CPU cache or, where these are not there, from their files; and it
belongs to the tenant that asked for it last. A scale is a number of the request alone, unless the adapter has
gains or shifts (DoRA, biases): then it is a mix of one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping

from aioengine.core.adapters.residency import Residency
from aioengine.core.state import AdapterEntry, AdapterFiles, Owner
from aioengine.errors import AdapterInvalid, EngineOverloaded
from aioengine.info import mix_name
from aioengine.step import HeldFiles, MixFiles, MixPart

MAX_MIXES = 64
"""Maximum number of mixes of one tenant that are known at a time."""
MAX_KEPT = 256
"""Number of mixes of all tenants above which those that no request uses are removed."""


class Mix:
    """The files of a mix; those of parts that were given in memory are shared until it is released."""

    nbytes = 0

    def __init__(self, parts: list[tuple[AdapterEntry, float]]) -> None:
        self.name = mix_name((f"{entry.label}@{entry.version}", weight) for entry, weight in parts)
        self.labels = {entry.label for entry, _ in parts}
        self.parts = parts
        self._shared: dict[int, AdapterFiles] = {}

    def hold(self) -> None:
        """Keep the files of parts that were given in memory, until :meth:`release`."""
        self._shared = {e.uid: e.files.share() for e, _ in self.parts if e.files is not None}

    @property
    def files(self) -> MixFiles:
        parts = (
            MixPart(
                entry.label, entry.path, weight, entry.digest or entry.expected, self._held(entry), entry.uid
            )
            for entry, weight in self.parts
        )
        return MixFiles(tuple(parts))

    def _held(self, entry: AdapterEntry) -> HeldFiles | None:
        files = self._shared[entry.uid].files if entry.uid in self._shared else None
        return files if isinstance(files, HeldFiles) else None

    def share(self) -> AdapterFiles:
        raise AdapterInvalid("a mix has no versions: load its parts", name=self.name)

    @property
    def outdated(self) -> bool:
        return any(entry.retired for entry, _ in self.parts)

    def release(self) -> None:
        for files in self._shared.values():
            files.release()


class Mixes:
    """Makes mixes, keeps them, and counts each for the tenant that asked for it last.

    Only a tenant's own mixes count against its bound. There is no bound on the mixes of all tenants that are
    in use, because each has a request, and requests have bounds.

    ``acquire`` finds the version that a name stands for. ``read_once`` waits until a version has been read,
    if it never was: only then it is known what it is made of.
    """

    def __init__(
        self,
        residency: Residency,
        acquire: Callable[..., Awaitable[AdapterEntry]],
        read_once: Callable[[AdapterEntry], Awaitable[None]],
    ) -> None:
        self._residency = residency
        self._acquire = acquire
        self._read_once = read_once
        self._known: dict[str, AdapterEntry] = {}
        self._of: dict[str | None, dict[str, None]] = {}
        """Each tenant's mixes by name, the least recently asked for first."""
        self._owners: dict[str, str | None] = {}
        self._made = 0

    async def acquire(
        self, weights: Mapping[str, float], tenant: str | None, now: float
    ) -> tuple[AdapterEntry, float]:
        """Return the mix, or the only adapter, and what that is multiplied by. A mix that is not known is
        made first. Raises as the look-up of its parts does, and EngineOverloaded if its tenant has too many
        other mixes in use."""
        parts: dict[str, AdapterEntry] = {}
        while (
            wanted := next((name for name in weights if not self._is_up_to_date(name, parts)), None)
        ) is not None:
            parts[wanted] = await self._acquire(wanted, tenant)
            await self._read_once(parts[wanted])
        found: dict[AdapterEntry, float] = {}
        for name, weight in weights.items():  # one may be named with its version and without
            found[parts[name]] = found.get(parts[name], 0.0) + weight
        if len(found) == 1:
            [(only, scale)] = found.items()
            if only.scalable:
                return only, scale
        # Two versions of one adapter are in the order of their content: each engine counts its own.
        mix = Mix(sorted(found.items(), key=lambda part: (part[0].label, part[0].digest, part[1])))
        name = mix.name
        self._residency.names.check_worth_a_try(name, now)
        known = self._known.get(name)
        if known is None or known.retired:
            self._drop_outdated(now)
        if self._owners.get(name, _NOBODY) != tenant:
            self._make_room(tenant, now)
        if known is None or known.retired:
            self._forget(name)
            self._made += 1
            mix.hold()
            known = self._declare(mix, now)
        known.owner = Owner(tenant)
        self._forget(name)
        self._known[name], self._owners[name] = known, tenant
        self._of.setdefault(tenant, {})[name] = None
        return known, 1.0

    def _declare(self, mix: Mix, now: float) -> AdapterEntry:
        """Make a mix known. Its size is about that of its parts together."""
        entry = self._residency.declare(mix.name, "mix:" + mix.name, files=mix, version=self._made)
        entries = [entry for entry, _ in mix.parts]
        nbytes = sum(part.nbytes for part in entries), sum(part.slot_nbytes for part in entries)
        self._residency.set_size(entry, *nbytes)
        self._residency.publish(entry, now)
        return entry

    def _is_up_to_date(self, name: str, parts: Mapping[str, AdapterEntry]) -> bool:
        """Whether what a name stands for is among ``parts``. While another is looked up, it may be replaced,
        which a name with a version allows, or unloaded."""
        entry = parts.get(name)
        lives = entry is not None and entry.uid in self._residency.entries
        return lives and ("@" in name or not parts[name].retired)

    def is_mix(self, entry: AdapterEntry) -> bool:
        return isinstance(entry.files, Mix)

    def is_made_of(self, entry: AdapterEntry, part: AdapterEntry) -> bool:
        """Whether an adapter is this one, or a mix with it."""
        files = entry.files
        return entry is part or (isinstance(files, Mix) and any(own is part for own, _ in files.parts))

    def forget(self, label: str, now: float) -> None:
        """Retire all mixes that contain this adapter, because it is being unloaded."""
        for name, entry in list(self._known.items()):
            if isinstance(entry.files, Mix) and label in entry.files.labels:
                self._retire(name, now)

    def _drop_outdated(self, now: float) -> None:
        for name, entry in list(self._known.items()):
            old = isinstance(entry.files, Mix) and entry.files.outdated
            if entry.retired or (old and not _is_used(entry)):
                self._retire(name, now)

    def _make_room(self, tenant: str | None, now: float) -> None:
        """Make room for one more mix of a tenant. Raises EngineOverloaded if all of its own are in use."""
        own = self._of.get(tenant, {})
        if len(own) >= MAX_MIXES:
            idle = self._idle(own)
            if idle is None:
                who = "requests without a tenant have" if tenant is None else f"tenant {tenant!r} has"
                raise EngineOverloaded(
                    f"{who} {MAX_MIXES} mixes of adapters in use, which is the maximum; try again later"
                )
            self._retire(idle, now)
        if len(self._known) >= MAX_KEPT:  # those of whoever has most go first
            for names in sorted(self._of.values(), key=len, reverse=True):
                while len(self._known) >= MAX_KEPT and (idle := self._idle(names)) is not None:
                    self._retire(idle, now)

    def _idle(self, names: Iterable[str]) -> str | None:
        """Return the first that no request uses."""
        known = self._known
        return next((name for name in names if not _is_used(known[name])), None)

    def _retire(self, name: str, now: float) -> None:
        entry = self._known[name]
        self._forget(name)
        if not entry.retired:
            self._residency.retire(entry, now)

    def _forget(self, name: str) -> None:
        if self._known.pop(name, None) is not None:
            tenant = self._owners.pop(name)
            del self._of[tenant][name]
            if not self._of[tenant]:
                del self._of[tenant]


def _is_used(entry: AdapterEntry) -> bool:
    return bool(entry.running or entry.waiting)


_NOBODY = object()
