"""The results of a comparison, as tables and figures take them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from aioengine.lab.analysis.measures import Measure

if TYPE_CHECKING:
    import polars as pl


class Compare(NamedTuple):
    """Data that figures are drawn from."""

    folder: Path
    results: pl.DataFrame
    estimates: pl.DataFrame
    measure: Measure
    """Measure that policies are ranked by."""

    @property
    def policies(self) -> list[str]:
        """Return the policies in the order in which they were given, which is that of their colours."""
        return self.results["policy"].unique(maintain_order=True).to_list()

    def settings(self) -> list[tuple[int, float]]:
        """Slots and scale, of all there are."""
        return sorted(self.results.select("slots", "scale").unique().iter_rows())

    def of(self, figure: str, **where: Any) -> pl.DataFrame:
        """Return the estimates of a figure, where columns have these values."""
        frame = self.estimates.filter(self.estimates["figure"] == figure)
        for column, value in where.items():
            frame = frame.filter(frame[column] == value)
        return frame


def setting_text(compare: Compare, slots: int, scale: float) -> str:
    """ "8 slots", "8 slots, load x1.5" """
    text = f"{slots} slot{'s' * (slots != 1)}"
    return f"{text}, load ×{scale:g}" if compare.results["scale"].n_unique() > 1 else text
