"""Rows that are recorded of a run, live or simulated: written to CSV files, and read back as data frames."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self, get_args, get_type_hints

from aioengine.errors import ConfigError
from aioengine.lab.workload.extra import needs_extra

if TYPE_CHECKING:
    import polars as pl

BASE = "(base)"
"""The base model among the adapters in ``Sample.service``; no adapter can have this name."""
DIGITS = 9
"""Times are written to the nanosecond."""


class RequestRecord(NamedTuple):
    """One request, at its end. Times are seconds from the start of the run; None: it did not get that far."""

    request_id: str
    adapter: str | None
    tenant: str | None
    prompt_tokens: int
    output_tokens: int
    """Generated."""
    arrival: float
    admitted: float | None
    first_token: float | None
    ended: float
    reason: str
    """Reason as in :class:`~aioengine.events.RequestEnded`, or "refused": it was never accepted."""
    found: str | None
    """Place of its adapter when it arrived: "slot", "cpu", "loading" or "disk"; None: the base model."""
    cached_tokens: int
    preemptions: int
    worst_gap: float | None
    """The longest time between two of its tokens."""
    deadline: float | None
    """Seconds from the start of the run."""
    rank: int = 0
    error: str | None = None


class SlotSpan(NamedTuple):
    """A slot's stay with one adapter: written from ``start`` to ``ready``, its until ``end``."""

    slot: int
    adapter: str
    start: float
    ready: float | None
    """None: the copy failed, or had not ended with the run."""
    end: float
    busy_steps: int
    """Steps that used it."""


class Move(NamedTuple):
    """A load from disk ("disk"), or a copy into a slot ("slot"), at its end."""

    stage: str
    adapter: str
    start: float
    end: float
    nbytes: int
    error: str | None = None


class Sample(NamedTuple):
    """The engine over an interval that ends at ``time``; counts are sums over it, the rest is at its end."""

    time: float
    running: int
    waiting: int
    steps: int
    step_seconds: float
    prefill_tokens: int
    decode_tokens: int
    adapters: int
    """Sum over the steps of the distinct adapters in them."""
    kv_used: float
    """Share of the KV blocks."""
    slots_ready: int
    cpu_adapters: int
    service: str
    """JSON: tokens computed in the interval by tenant (or by adapter where there are no tenants)."""


class MemorySink:
    """Receiver of records that keeps everything."""

    def __init__(self) -> None:
        self.requests: list[RequestRecord] = []
        self.spans: list[SlotSpan] = []
        self.moves: list[Move] = []
        self.samples: list[Sample] = []
        self.request, self.span = self.requests.append, self.spans.append
        self.move, self.sample = self.moves.append, self.samples.append

    @property
    def finished(self) -> list[RequestRecord]:
        return [record for record in self.requests if record.error is None and record.first_token is not None]

    @property
    def seconds(self) -> float:
        """End of the last request that has finished."""
        return max((record.ended for record in self.finished), default=0.0)


FILES: Mapping[str, type[Any]] = {
    "requests": RequestRecord,
    "slots": SlotSpan,
    "moves": Move,
    "samples": Sample,
}
"""Name of a file without ".csv" -> the type of its rows."""


class CsvFiles:
    """Receiver of records that writes a CSV file for each kind of row: memory does not grow with the run.

    The first line has the names of the columns. None becomes an empty field.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._files = ExitStack()
        self.request, self.span, self.move, self.sample = (
            self._writer(folder / f"{name}.csv", kind._fields) for name, kind in FILES.items()
        )

    def _writer(self, path: Path, fields: Sequence[str]) -> Any:
        """Return what writes a row into a new file."""
        file = self._files.enter_context(path.open("w", encoding="utf-8", newline=""))
        write = csv.writer(file, lineterminator="\n").writerow
        write(fields)
        return lambda row: write([round(one, DIGITS) if type(one) is float else one for one in row])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._files.close()


Sink = MemorySink | CsvFiles
"""Receiver of records."""


class Frames(NamedTuple):
    """The rows of a run: a frame for each file, a column for each field of its record type."""

    requests: pl.DataFrame
    """:class:`RequestRecord`, in order of their ends."""
    slots: pl.DataFrame
    """:class:`SlotSpan`."""
    moves: pl.DataFrame
    """:class:`Move`."""
    samples: pl.DataFrame
    """:class:`Sample`."""


def load_frames(folder: str | Path) -> Frames:
    """Read the four files that a run wrote to ``folder``.

    Raises ConfigError if a file is missing, or was not written by the lab.
    """
    return Frames(*(load_frame(folder, name) for name in FILES))


def load_frame(folder: str | Path, name: str) -> pl.DataFrame:
    """Read one file: "requests", "slots", "moves" or "samples". Raises ConfigError as above."""
    with needs_extra():
        import polars as pl
    path = Path(folder) / f"{name}.csv"
    kinds: dict[type, Any] = {int: pl.Int64, float: pl.Float64, str: pl.String}
    hints = get_type_hints(FILES[name]).items()
    schema = {column: kinds[(get_args(hint) or (hint,))[0]] for column, hint in hints}
    try:
        with path.open(encoding="utf-8") as file:
            header = file.readline().rstrip("\r\n")
        if header != ",".join(schema):
            raise ConfigError(f"{path}: no file of a run: columns {header!r}, not {','.join(schema)!r}")
        return pl.read_csv(path, schema=schema)
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path}: no such file; 'aioengine lab run --out {folder}' would write it"
        ) from error
    except (OSError, UnicodeDecodeError, pl.exceptions.PolarsError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
