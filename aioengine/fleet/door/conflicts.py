"""Whether an adapter has the same content on all replicas, by the SHA-256 of the files that each has read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from aioengine.info import AdapterInfo


class Conflicts:
    """Adapters of which two replicas hold different content under one name.

    A replica reads an adapter's files when a request first needs it there. If they were changed meanwhile
    without telling the fleet, replicas that read them earlier answer with the old content.
    """

    def __init__(self) -> None:
        self.count = 0
        """Conflicts found so far."""
        self._known: dict[str, frozenset[str]] = {}
        """Digests that were found to differ, by adapter."""

    def found(self, names: Iterable[str], held: Mapping[str, Sequence[AdapterInfo]]) -> list[str]:
        """Return those of ``names`` with different content, each once for the same contents. ``held`` has the
        adapters of each replica."""
        new = []
        for name in names:
            digests = contents(name, held)
            if len(digests) > 1 and self._known.get(name) != digests:
                self._known[name] = digests
                self.count += 1
                new.append(name)
        return new


def contents(name: str, held: Mapping[str, Sequence[AdapterInfo]]) -> frozenset[str]:
    """The digests of an adapter's newest versions, over the replicas that have read it."""
    found: set[str] = set()
    for infos in held.values():
        mine = [info for info in infos if info.name == name and info.digest]
        if mine:
            found.add(max(mine, key=lambda info: info.version).digest)
    return frozenset(found)
