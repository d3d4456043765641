"""Records written to CSV files as they come, so that a run's memory does not grow with its length."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Self

from aioengine.lab.runs.rows import Move, RequestRecord, Sample, SlotSpan

DIGITS = 9
"""Times are written to the nanosecond."""
_FILES: dict[str, type[Any]] = {
    "requests.csv": RequestRecord,
    "slots.csv": SlotSpan,
    "moves.csv": Move,
    "samples.csv": Sample,
}


class CsvFiles:
    """A :class:`~aioengine.lab.runs.rows.Sink`: a file of each kind in a folder, with a row of names at the
    top. None is an empty field."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._files: list[IO[str]] = []
        self._requests, self._spans, self._moves, self._samples = (
            self._open(folder / name, kind._fields) for name, kind in _FILES.items()
        )

    def _open(self, path: Path, fields: Sequence[str]) -> Any:
        file = path.open("w", encoding="utf-8", newline="")
        self._files.append(file)
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(fields)
        return writer

    def request(self, record: RequestRecord) -> None:
        self._requests.writerow(_rounded(record))

    def span(self, record: SlotSpan) -> None:
        self._spans.writerow(_rounded(record))

    def move(self, record: Move) -> None:
        self._moves.writerow(_rounded(record))

    def sample(self, record: Sample) -> None:
        self._samples.writerow(_rounded(record))

    def close(self) -> None:
        for file in self._files:
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _rounded(record: Sequence[Any]) -> list[Any]:
    return [round(value, DIGITS) if type(value) is float else value for value in record]
