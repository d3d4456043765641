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
        """By adapter: the digest that each replica holds."""
        self._of: dict[str, dict[str, str]] = {}
        """The same by replica."""
        self._known: dict[str, frozenset[str]] = {}
        """Digests that were found to differ, by adapter."""

    def holds(self, replica: str, infos: Iterable[AdapterInfo]) -> list[str]:
        """Take what a replica holds now, and return the adapters whose content differs from another's, each
        once for the same contents. Only what has changed is compared with other replicas."""
        newest: dict[str, AdapterInfo] = {}
        for info in infos:
            if (
                info.digest
                and not is_mix(info.name)
                and (info.name not in newest or newest[info.name].version < info.version)
            ):
                newest[info.name] = info
        before = self._of.get(replica, {})
        now = self._of[replica] = {name: info.digest for name, info in newest.items()}
        for name in before.keys() - now.keys():
            self._drop(name, replica)
        found = []
        for name, digest in now.items() - before.items():
            self._held.setdefault(name, {})[replica] = digest
            contents = self.contents(name)
            if len(contents) < 2:
                self._known.pop(name, None)
            elif self._known.get(name) != contents:
                self._known[name] = contents
                found.append(name)
        return found

    def forget(self, replica: str) -> None:
        """Drop what a replica held that is gone."""
        for name in self._of.pop(replica, {}):
            self._drop(name, replica)

    def contents(self, name: str) -> frozenset[str]:
        """Return the digests of an adapter, over the replicas that have read it."""
        return frozenset(self._held.get(name, {}).values())

    def _drop(self, name: str, replica: str) -> None:
        del self._held[name][replica]
        if not self._held[name]:
            del self._held[name]
            self._known.pop(name, None)
