"""What a grammar may take."""

from __future__ import annotations

from collections.abc import Collection

import msgspec

from aioengine.errors import RequestInvalid

MiB = 2**20

MAX_DEPTH = 64
"""Bound on how deep a JSON schema is nested. References do not count: each is written once, at the top."""
MAX_SCHEMAS = 20_000
"""Bound on the schemas within a schema, those behind references included."""
MAX_PROPERTIES = 2_000
"""Bound on the properties of one object. The compiler's time grows with their square, since after each that
may be left out all others may follow: 2,000 take 0.3 s, 5,000 two to seven."""
MAX_COMPARED = 5_000
"""Bound on the pairs of alternatives of ``oneOf`` that are compared; beyond it they count as overlapping."""


class GrammarLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds for the grammars of one :class:`~aioengine.guided.Guide`. Seconds are of processor time, so that
    they mean the same on a busy machine, unless it says otherwise."""

    max_characters: int = 2**18
    """Of a grammar's text."""
    quick_seconds: float = 0.5
    """A compile that takes longer is stopped, and begins again, nicer, when no other long one runs. One short
    and one long compile run at a time, so that no long one holds up a short one."""
    compile_seconds: float = 5.0
    """A compile that takes longer is given up."""
    compile_wall_seconds: float = 30.0
    """The same, in wall time."""
    mask_seconds: float = 1.0
    """A grammar that takes longer for one token is given up."""
    mask_wall_seconds: float = 10.0
    """The same, in wall time."""
    memory: int = 256 * MiB
    """Bytes that one grammar's process may take, with the parsers of all requests that have it."""
    total_memory: int = 1024 * MiB
    """Bytes of all of them together. Above it those that no request has are dropped, and then the largest."""
    max_grammars: int = 128
    """Processes that are kept, those of recent grammars that no request has included. One tenant's requests
    may have its share of them: half if there is one tenant, a third each if there are two, ..."""
    max_queued: int = 32
    """Grammars that one tenant may have waiting to be compiled."""
    room_seconds: float = 0.5
    """How long a compile waits (in wall time) for requests to end if there are too many processes."""


def check_properties(names: Collection[str]) -> None:
    """Raises RequestInvalid if one object has too many properties."""
    if len(names) > MAX_PROPERTIES:
        raise RequestInvalid(
            f"the schema has an object with {len(names)} properties, and at most {MAX_PROPERTIES} are "
            "compiled"
        )
