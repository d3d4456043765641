"""``aioengine lab record``: a server whose requests become a trace."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from aioengine.cli.common import CommonFlags
from aioengine.cli.flags import EngineFlags
from aioengine.cli.record_flags import RecordFlags
from aioengine.cli.serve import ServerFlags, serve


def record(
    file: Annotated[Path, Parameter(show_default=False)],
    /,
    *,
    server: ServerFlags | None = None,
    engine: EngineFlags | None = None,
    common: CommonFlags | None = None,
) -> int:
    """Serve, and append a line per request to a file for --trace.

    The same as serve --record FILE. Times, lengths and names are written, and never what was said.

    Parameters
    ----------
    file
        JSON lines; it may be there already, as a recording.
    """
    return serve(server=server, engine=engine, recording=RecordFlags(record=file), common=common)
