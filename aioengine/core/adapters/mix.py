"""Mixes: weighted sums of adapters, or one with a scale, that are computed from the slots of their parts."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

from aioengine.core.state import AdapterEntry, AdapterFiles
from aioengine.schedulers.policy import Location

_SLOWEST_FIRST = (Location.DISK, Location.LOADING, Location.CPU, Location.SLOT)


class MixEntry(AdapterEntry):
    """A mix, which requests wait for and run on. It has no slot and no memory of its own: it is where the
    slowest of its parts is, and runs when all of them are in slots.

    Policies do not see it. A request for one scaled adapter waits among the requests for that adapter;
    ``waiting`` has the requests for a mix of several.
    """

    __slots__ = ("_digest", "_digested", "_members", "fitted", "uses")

    def __init__(
        self,
        uid: int,
        name: str,
        version: int,
        parts: Sequence[tuple[AdapterEntry, float]],
        files: AdapterFiles,
    ) -> None:
        self.parts = tuple(parts)
        self._members = tuple(part for part, _ in parts)
        self.uses = 0
        """Number of requests for it that have not ended."""
        self.fitted: object = None
        """Pinned adapters and sizes with which its parts were found to fit; see :func:`shut_out`."""
        self._digested: list[str] | None = None
        """The parts' digests that ``_digest`` was made of."""
        self._digest = ""
        super().__init__(uid, name, version, "mix:" + name, files=files, parts=self.parts)

    @property
    def members(self) -> Sequence[AdapterEntry]:
        return self._members

    @property
    def location(self) -> Location:
        found = {part.location for part, _ in self.parts}
        return next(location for location in _SLOWEST_FIRST if location in found)

    @location.setter
    def location(self, value: Location) -> None:
        """Do nothing, because its parts have their own."""

    @property
    def rank(self) -> int:
        return sum(part.rank for part, _ in self.parts)

    @rank.setter
    def rank(self, value: int) -> None:
        """Do nothing, as for ``location``."""

    @property
    def digest(self) -> str:
        """The digest of its content; "" while that of a part is not known."""
        digests = [part.digest for part, _ in self.parts]
        if digests != self._digested:  # each output has it
            self._digested, self._digest = digests, ""
            if all(digests):
                weights = [weight for _, weight in self.parts]
                content = repr(list(zip(digests, weights, strict=True)))
                self._digest = sha256(content.encode()).hexdigest()
        return self._digest

    @digest.setter
    def digest(self, value: str) -> None:
        """Do nothing, as for ``location``."""

    @property
    def home(self) -> AdapterEntry:
        return self.parts[0][0] if len(self.parts) == 1 else self

    @property
    def slots(self) -> Sequence[tuple[int, float]]:
        return tuple((-1 if part.slot is None else part.slot, weight) for part, weight in self.parts)
