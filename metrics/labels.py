"""The ``adapter`` label with bounded cardinality."""

from __future__ import annotations

BASE = "base"
OTHER = "other"


class AdapterLabels:
    """Maps adapter names to label values: the first ``limit`` distinct names keep theirs.

    All later ones share "other", and the base model (None) is "base". A name once given a label
    keeps it for good: a time series that changes its meaning is worse than a coarse one.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._known: dict[str, str] = {}

    def of(self, adapter: str | None) -> str:
        if adapter is None:
            return BASE
        label = self._known.get(adapter)
        if label is None:
            if len(self._known) >= self._limit:
                return OTHER
            # An adapter that is really called "base" or "other" must not pass for something else.
            label = f"adapter:{adapter}" if adapter in (BASE, OTHER) else adapter
            self._known[adapter] = label
        return label
