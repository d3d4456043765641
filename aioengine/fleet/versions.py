"""Version numbers of a fleet's adapters: no number ever stands for two contents of one name."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec

from aioengine.errors import AdapterNotFound
from aioengine.info import AdapterInfo, is_mix, without_versions

MAX_NAMES = 10_000
"""Names whose own last number is remembered."""
MAX_VERSIONS = 16
"""Versions of a name that a replica can tell apart; earlier ones count as gone."""


class SpentVersions(msgspec.Struct):
    """The last number of each name that has no entry, or whose number was given out and not used yet. The
    oldest of more than ``MAX_NAMES`` names are forgotten: all forgotten names together have one last number,
    the highest of theirs."""

    last: dict[str, int] = {}
    """Numbers by name; the one that was spent last is at the end."""
    others: int = 0
    """The last number of every other name."""

    def of(self, name: str) -> int:
        """Return the highest number that may have been used for the name; 0: none."""
        return self.last.get(name, self.others)

    def spend(self, name: str, number: int) -> None:
        """Note that all numbers up to this one are used."""
        number = max(number, self.of(name))
        self.last.pop(name, None)
        self.last[name] = number
        while len(self.last) > MAX_NAMES:
            self.others = max(self.others, self.last.pop(next(iter(self.last))))

    def entered(self, name: str, number: int) -> None:
        """Note that an entry has this number. If it is the name's last one, the entry itself says so."""
        if self.last.get(name, number + 1) <= number:
            del self.last[name]


class ReplicaVersions:
    """The fleet's version of each adapter that a replica was told of, and the number that its engine has
    given to it: an engine that has started later counts fewer.

    ``configured``: names of the adapters that it knows from its start.
    """

    def __init__(self, configured: Iterable[str]) -> None:
        self._configured = frozenset(configured)
        self._numbers = {name: {1: 1} for name in self._configured}
        """By name: the engine's number of each of the fleet's latest versions."""
        self._spent = SpentVersions()

    def of(self, name: str) -> int:
        """Return the fleet's version; 0: the replica was not told of it."""
        return max(self._numbers.get(name, ()), default=0)

    def highest(self, name: str) -> int:
        """Return the highest version that the replica was ever told of; 0: none."""
        return max(self.of(name), self._spent.of(name))

    def note(self, version: int, info: AdapterInfo) -> None:
        """Note that what an engine describes so is this version of the fleet."""
        numbers = self._numbers.setdefault(info.name, {})
        numbers[version] = info.version
        if len(numbers) > MAX_VERSIONS:
            del numbers[min(numbers)]

    def forget(self, name: str) -> None:
        """Note that the adapter is gone."""
        self._spent.spend(name, self.of(name))
        self._numbers.pop(name, None)

    def others(self, names: Iterable[str]) -> list[str]:
        """Return the adapters that the replica was told of and that are not among these."""
        return list(self._numbers.keys() - self._configured - set(names))

    def own(self, adapter: str, *, compared: bool = False) -> str:
        """Return what the engine calls an adapter that the fleet calls "name@version". If the replica does
        not know this version, raises AdapterNotFound or, if the content will be ``compared``, returns the
        current one. "name@0" has no number, and is the current one, too."""
        name, _, version = adapter.partition("@")
        if version in ("", "0"):
            return name
        for number, own in self._numbers.get(name, {}).items():
            if version == str(number):
                return f"{name}@{own}"
        if compared:
            return name
        raise gone(adapter)

    def current(self, names: Iterable[str], find: Callable[[str], AdapterInfo | None]) -> list[str]:
        """Return the versions that requests for these names get now; ``find`` describes what an engine calls
        by a name. "name@0": there is no number, or the engine must look for it first."""
        versions = []
        for name in names:
            info = None if "@" in name else find(name)
            number = 0 if info is None else self.number(name, info.version)
            versions.append(name if "@" in name else f"{name}@{number}")
        return versions

    def began_with(
        self, before: list[str], names: Iterable[str], find: Callable[[str], AdapterInfo | None]
    ) -> list[str]:
        """Return the versions that a request has begun with; ``before`` were current when it was sent to the
        engine. Where that had to look for one, others may have been replaced meanwhile: then it is not known
        which of the two the request has got, and no number is said."""
        if not any(version.endswith("@0") for version in before):
            return before
        return [
            version if version == now else f"{version.partition('@')[0]}@0"
            for version, now in zip(before, self.current(names, find), strict=True)
        ]

    def told(self, info: AdapterInfo) -> AdapterInfo:
        """Return what the gateways are told of an adapter in memory: a version has the fleet's number, and a
        mix has its name without versions, because each engine counts its own."""
        if is_mix(info.name):
            return msgspec.structs.replace(info, name=without_versions(info.name))
        if info.name not in self._numbers:
            return info
        return msgspec.structs.replace(info, version=self.number(info.name, info.version))

    def number(self, name: str, own: int) -> int:
        """Return the fleet's number of the version that the engine numbers ``own``; 0: it has none."""
        numbers = self._numbers.get(name, {})
        return max((number for number, other in numbers.items() if other == own), default=0)


def gone(adapter: str) -> AdapterNotFound:
    """Make the error for a version that no request runs on any more."""
    why = "this version is gone: it was replaced, and its last request has ended"
    return AdapterNotFound(why, name=adapter)
