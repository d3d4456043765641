"""Labels with bounded cardinality: of adapters and of tenants."""

from __future__ import annotations

from collections.abc import Callable

BASE = "base"
OTHER = "other"
NOBODY = "none"


class BoundedLabels:
    """Maps names to label values, of which there are at most ``limit``, "other", and ``nobody`` for None.

    The first ``limit`` names get separate labels, the others share "other". A name in "other" with more than
    twice the requests of the least used labelled name takes its label. The factor of two keeps two names of
    equal use from taking turns: a label changes only as often as usage doubles.

    ``folded(label)`` is called when a label is removed: its series must be added to "other". ``kind`` says
    what the names stand for.
    """

    def __init__(self, limit: int, folded: Callable[[str], None], *, nobody: str, kind: str) -> None:
        self._limit = limit
        self._nobody = nobody
        self._kind = kind
        self._folded = folded
        self._labels: dict[str, str] = {}
        self._uses: dict[str, int] = {}
        self._least = 0
        """A lower bound on the uses of every adapter that has a label."""

    def of(self, name: str | None) -> str:
        if name is None:
            return self._nobody
        label = self._labels.get(name)
        if label is None:
            if len(self._labels) >= self._limit:
                return OTHER
            label = self._give(name)
        return label

    def used(self, name: str) -> None:
        """Count a request for ``name``, which may then get a separate label."""
        uses = self._uses[name] = self._uses.get(name, 0) + 1
        if name in self._labels or self._limit == 0:
            return
        if len(self._labels) < self._limit:
            self._give(name)
        elif uses > 2 * self._least:
            victim = min(self._labels, key=lambda name: self._uses.get(name, 0))
            self._least = self._uses.get(victim, 0)
            if uses > 2 * self._least:
                self._take(victim)
                self._give(name)

    def gone(self, name: str) -> None:
        """Free the label of a name that is no longer in use."""
        self._uses.pop(name, None)
        if name in self._labels:
            self._take(name)

    def _give(self, name: str) -> str:
        # A name that is really "base" or "other" gets a label with a space, which no adapter's name can
        # contain.
        label = f"{name} ({self._kind})" if name in (self._nobody, OTHER) else name
        self._labels[name] = label
        self._least = min(self._least, self._uses.get(name, 0))
        return label

    def _take(self, name: str) -> None:
        self._folded(self._labels.pop(name))
