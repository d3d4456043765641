"""The adapter that the device has merged with the base model's weights.

The device keeps the base model's weights, and beside them a second copy for one adapter (dLoRA, Wu et al.,
OSDI'24, adds to the base model's own weights and subtracts again). A step takes the merged copy if all of its
sequences are of that adapter, and the base model's weights otherwise. So a request for another adapter never
waits for a switch, and nothing has to be restored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from aioengine import events
from aioengine.core.adapters.moves import MergeMove
from aioengine.core.state import AdapterEntry
from aioengine.schedulers.policy import Location
from aioengine.step import SequenceWork


class Merging:
    """The merged adapter, and the one that is being merged. ``entries`` are all versions that there are, by
    uid."""

    def __init__(
        self, possible: bool, entries: Mapping[int, AdapterEntry], emit: Callable[[events.Event], None]
    ) -> None:
        self.possible = possible
        """Whether the device has memory for merged weights."""
        self.entry: AdapterEntry | None = None
        """The adapter whose merged weights are there."""
        self.under_way: AdapterEntry | None = None
        """The adapter that the device is merging."""
        self._digest = self._digest_under_way = ""
        """The contents of the two: an adapter's files may change, and be read again."""
        self._entries = entries
        self._emit = emit
        self._moves: list[MergeMove] = []

    def apply(self, entries: Sequence[AdapterEntry], now: float) -> Iterator[tuple[str, str]]:
        """Begin to merge the first of these that is not merged yet; its predecessor's merged weights are
        gone. Yields (reason, name) of those that are refused. No step may be in flight."""
        for entry in entries:
            if entry is self.entry or entry is self.under_way:
                continue
            reason = self._obstacle(entry)
            if reason is not None:
                yield reason, entry.name
                continue
            self._drop(now)
            self.under_way, self._digest_under_way = entry, entry.digest
            self._moves.append(MergeMove(entry))

    def _obstacle(self, entry: AdapterEntry) -> str | None:
        if not self.possible:
            return "merge_not_supported"
        if self.under_way is not None:
            return "merge_busy"
        if entry.location not in (Location.CPU, Location.SLOT):
            return "merge_not_on_cpu"
        return None if entry.mergeable else "merge_not_exact"

    def merged(self, entry: AdapterEntry, now: float, seconds: float) -> None:
        """Note that the device has merged an adapter. Steps use it from now on, if it is still there, and
        still is what was merged."""
        assert entry is self.under_way
        self.under_way = None
        entry.merge_seconds = seconds
        if entry.uid in self._entries and self._is(entry, self._digest_under_way):
            self.entry, self._digest = entry, self._digest_under_way
            self._emit(
                events.AdapterMerged(time=now, adapter=entry.label, version=entry.version, seconds=seconds)
            )

    def failed(self, entry: AdapterEntry) -> None:
        """Note that the device could not merge an adapter. That content is not tried again."""
        assert entry is self.under_way
        self.under_way = None
        entry.merge_failed = self._digest_under_way
        if entry.digest == entry.merge_failed:
            entry.mergeable = False

    def loaded(self, entry: AdapterEntry, now: float, *, mergeable: bool) -> None:
        """Note that an adapter's ``digest`` was read. ``mergeable``: whether that content can be merged. If
        it is another content than the merged one, the merged weights are forgotten."""
        entry.mergeable = mergeable and entry.digest != entry.merge_failed
        if entry is self.entry and not self._is(entry, self._digest):
            self._drop(now)

    @staticmethod
    def _is(entry: AdapterEntry, digest: str) -> bool:
        """Whether merged weights of this content are an adapter's."""
        return entry.mergeable and entry.digest == digest

    def sweep(self, now: float) -> None:
        """Forget the merged weights of a version that is gone."""
        if self.entry is not None and self.entry.uid not in self._entries:
            self._drop(now)

    def device_lost(self, now: float) -> None:
        """Note that the merged weights are gone, and what was under way."""
        self.under_way = None
        self._moves = []
        self._drop(now)

    def _drop(self, now: float) -> None:
        entry, self.entry = self.entry, None
        if entry is not None:
            self._emit(events.AdapterUnmerged(time=now, adapter=entry.label, version=entry.version))

    def covering(self, work: Sequence[SequenceWork]) -> int | None:
        """Return the uid of the merged adapter if all of ``work``, which is sorted by slot, is its; else
        None."""
        entry = self.entry
        if entry is None or entry.slot is None or not work:
            return None
        if not work[0].slot == work[-1].slot == entry.slot or any(row.parts for row in work):
            return None
        return entry.uid

    def take_moves(self) -> list[MergeMove]:
        moves, self._moves = self._moves, []
        return moves

    def check(self) -> None:
        """Assert that what is merged can be, is what was read last, and is not being merged at the same
        time."""
        for entry in (self.entry, self.under_way):
            assert entry is None or self.possible
        assert self.entry is None or self.entry is not self.under_way
        assert self.entry is None or self._is(self.entry, self._digest)
