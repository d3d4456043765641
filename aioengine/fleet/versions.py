"""Version numbers of a fleet's adapters: no number ever stands for two contents of one name."""

from __future__ import annotations

import msgspec

from aioengine.errors import AdapterNotFound

MAX_NAMES = 10_000
"""Names whose own last number is remembered."""


class SpentVersions(msgspec.Struct):
    """The last number of each name that has had an entry and has none. The oldest of more than ``MAX_NAMES``
    names are forgotten: all forgotten names together have one last number, the highest of theirs."""

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


def gone(adapter: str) -> AdapterNotFound:
    """Make the error for a version that no request runs on any more."""
    why = "this version is gone: it was replaced, and its last request has ended"
    return AdapterNotFound(why, name=adapter)
