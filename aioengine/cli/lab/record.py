"""``aioengine lab record``: runs a server and records its requests as a trace."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from aioengine.cli.common import CommonFlags
from aioengine.cli.config.checked import ServerFlags
from aioengine.cli.flags import EngineFlags
from aioengine.cli.record_flags import RecordFlags
from aioengine.cli.serve import serve


def record(
    file: Annotated[Path, Parameter(show_default=False)],
    /,
    *,
    server: ServerFlags | None = None,
    engine: EngineFlags | None = None,
    common: CommonFlags | None = None,
) -> int:
    """Serve, and append a line per request to a file for --trace.

    The same as serve --record FILE. It writes times, lengths and names, and never any text.

    Args:
        file: JSON lines; may be an earlier recording, to which lines are added.
    """
    return serve(server=server, engine=engine, recording=RecordFlags(record=file), common=common)
