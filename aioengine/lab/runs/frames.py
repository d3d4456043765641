"""A run's files as data frames."""

from __future__ import annotations

import types
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args, get_type_hints

from aioengine.errors import ConfigError
from aioengine.lab.runs.rows import Move, RequestRecord, Sample, SlotSpan
from aioengine.lab.workload.extra import needs_extra

if TYPE_CHECKING:
    import polars as pl

FILES: Mapping[str, type[Any]] = {
    "requests": RequestRecord,
    "slots": SlotSpan,
    "moves": Move,
    "samples": Sample,
}
"""Name of a file, less ".csv" -> the record that is a row of it."""


class Frames(NamedTuple):
    """The rows of a run: a frame for each file, a column for each field of its record type."""

    requests: pl.DataFrame
    """:class:`~aioengine.lab.runs.rows.RequestRecord`, in order of their ends."""
    slots: pl.DataFrame
    """:class:`~aioengine.lab.runs.rows.SlotSpan`."""
    moves: pl.DataFrame
    """:class:`~aioengine.lab.runs.rows.Move`."""
    samples: pl.DataFrame
    """:class:`~aioengine.lab.runs.rows.Sample`."""


def load_frames(folder: str | Path) -> Frames:
    """Read what a run has left in ``folder``.

    Raises ConfigError if a file is missing, or is none of this lab's.
    """
    return Frames(*(load_frame(folder, name) for name in FILES))


def load_frame(folder: str | Path, name: str) -> pl.DataFrame:
    """One of them: "requests", "slots", "moves" or "samples"."""
    with needs_extra():
        import polars as pl
    path = Path(folder) / f"{name}.csv"
    columns = _columns(FILES[name])
    kinds: dict[type, Any] = {int: pl.Int64, float: pl.Float64, str: pl.String}
    schema = {column: kinds[kind] for column, kind in columns.items()}
    try:
        with path.open(encoding="utf-8") as file:
            header = file.readline().rstrip("\r\n")
        if header != ",".join(columns):
            raise ConfigError(f"{path}: no file of a run: columns {header!r}, not {','.join(columns)!r}")
        return pl.read_csv(path, schema=schema)
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path}: no such file; 'aioengine lab run --out {folder}' would write it"
        ) from error
    except (OSError, UnicodeDecodeError, pl.exceptions.PolarsError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error


def _columns(record: type[Any]) -> dict[str, type]:
    """Field -> its type, less its None."""
    return {name: _plain(hint) for name, hint in get_type_hints(record).items()}


def _plain(hint: Any) -> type:
    if isinstance(hint, types.UnionType):
        (hint,) = (part for part in get_args(hint) if part is not type(None))
    assert isinstance(hint, type)
    return hint
