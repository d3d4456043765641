"""The ``adapter`` label with bounded cardinality."""

from __future__ import annotations

from collections.abc import Callable

BASE = "base"
OTHER = "other"


class AdapterLabels:
    """Maps adapter names to label values, of which there are at most ``limit``, "base" and "other".

    The first ``limit`` adapters get a label of their own, the others share "other"; the base model
    (None) is "base". An adapter in "other" that has had more than twice the requests of the least used
    one that has a label takes its place. Twice, so that two adapters in equal use do not take it in
    turns: a label changes hands only as often as usage doubles.

    ``folded(label)`` is called when a label ceases to be: its series must be added to "other".
    """

    def __init__(self, limit: int, folded: Callable[[str], None]) -> None:
        self._limit = limit
        self._folded = folded
        self._labels: dict[str, str] = {}
        self._uses: dict[str, int] = {}
        self._least = 0
        """A lower bound on the uses of every adapter that has a label."""

    def of(self, adapter: str | None) -> str:
        if adapter is None:
            return BASE
        label = self._labels.get(adapter)
        if label is None:
            if len(self._labels) >= self._limit:
                return OTHER
            label = self._give(adapter)
        return label

    def used(self, adapter: str) -> None:
        """Count a request for ``adapter``; it may earn it a label."""
        uses = self._uses[adapter] = self._uses.get(adapter, 0) + 1
        if adapter in self._labels or self._limit == 0:
            return
        if len(self._labels) < self._limit:
            self._give(adapter)
        elif uses > 2 * self._least:
            victim = min(self._labels, key=lambda name: self._uses.get(name, 0))
            self._least = self._uses.get(victim, 0)
            if uses > 2 * self._least:
                self._take(victim)
                self._give(adapter)

    def unloaded(self, adapter: str) -> None:
        """The name stands for no adapter any more: its label goes."""
        self._uses.pop(adapter, None)
        if adapter in self._labels:
            self._take(adapter)

    def _give(self, adapter: str) -> str:
        # An adapter that is really called "base" or "other" must not pass for something else, and no
        # adapter's name can contain a space.
        label = f"{adapter} (adapter)" if adapter in (BASE, OTHER) else adapter
        self._labels[adapter] = label
        self._least = min(self._least, self._uses.get(adapter, 0))
        return label

    def _take(self, adapter: str) -> None:
        self._folded(self._labels.pop(adapter))
