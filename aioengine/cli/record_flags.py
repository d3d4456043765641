"""The flag that records requests as a trace."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cyclopts import Group, Parameter

from aioengine.cli.help import FOLDED

if TYPE_CHECKING:
    from aioengine.lab.runs.trace_writer import TraceWriter


@Parameter(name="*", group=Group(f"{FOLDED}: recording", sort_key=80))
@dataclass(frozen=True, kw_only=True)
class RecordFlags:
    """A command takes it in a parameter called ``recording``."""

    record: Path | None = None
    """Append a line per request to this file, a trace for the lab without any text."""

    def writer(self) -> AbstractAsyncContextManager[TraceWriter | None]:
        """Make the writer. Attach it to the engine, and enter it before the engine, so that it also records
        the requests that end with the engine.

        Raises ConfigError if the file cannot be written.
        """
        if self.record is None:
            return nullcontext()
        from aioengine.lab.runs.trace_writer import TraceWriter

        return TraceWriter(self.record)
