"""Whether an adapter has the same content on all replicas, by the SHA-256 of the files that each has read."""

from __future__ import annotations

from collections.abc import Iterable

from aioengine.info import AdapterInfo, is_mix


class Conflicts:
    """Adapters of which two replicas hold different content under one name.

    A replica reads an adapter's files when a request first needs it there. If they were changed meanwhile
    without telling the fleet, replicas that read them earlier answer with the old content.
    """

    def __init__(self) -> None:
        self.count = 0
        """Conflicts so far that were none of a replacement; counted by whoever looks into them."""
        self._held: dict[str, dict[str, str]] = {}
        """By replica: the digest of each adapter that it holds."""
        self._known: dict[str, frozenset[str]] = {}
        """Digests that were found to differ, by adapter."""

    def holds(self, replica: str, infos: Iterable[AdapterInfo]) -> list[str]:
        """Take what a replica holds now, and return the adapters whose content differs from another's, each
        once for the same contents. Only what has changed is compared with other replicas."""
        read = sorted((info for info in infos if info.digest and not is_mix(info.name)), key=_version)
        before, now = self._held.get(replica, {}), {info.name: info.digest for info in read}
        self._held[replica] = now
        found = []
        for name in before.keys() - now.keys():
            if not self.contents(name):
                self._known.pop(name, None)
        for name, _ in now.items() - before.items():
            contents = self.contents(name)
            if len(contents) < 2:
                self._known.pop(name, None)
            elif self._known.get(name) != contents:
                self._known[name] = contents
                found.append(name)
        return found

    def forget(self, replica: str) -> None:
        """Drop what a replica held that is gone."""
        self.holds(replica, ())
        self._held.pop(replica)

    def contents(self, name: str) -> frozenset[str]:
        """Return the digests of an adapter, over the replicas that have read it."""
        return frozenset(held[name] for held in self._held.values() if name in held)


def _version(info: AdapterInfo) -> int:
    return info.version
