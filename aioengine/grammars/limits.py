"""Limits of grammars."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from aioengine.errors import RequestInvalid

MiB = 2**20


class GrammarLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds for the grammars of one :class:`~aioengine.guided.Guide`. Seconds are processor time unless
    stated otherwise, so that they mean the same on a busy machine."""

    max_characters: int = 2**18
    """Maximum characters of a grammar's text."""
    compile_seconds: float = 5.0
    """A compile that takes longer is given up."""
    compile_wall_seconds: float = 30.0
    """The same, in wall time."""
    mask_seconds: float = 1.0
    """A grammar that takes longer for one token is given up."""
    mask_wall_seconds: float = 10.0
    """The same, in wall time."""
    memory: int = 256 * MiB
    """Maximum bytes of one grammar, with the parsers of all its requests."""
    total_memory: int = 1024 * MiB
    """Maximum bytes of all grammars together. Above it unused ones are dropped first, and then the largest
    of the tenant whose grammars take the most."""
    max_kept: int = 128
    """Unused grammars are dropped while there are more grammars than this."""
    max_queued: int = 32
    """Maximum grammars of one tenant that wait to be compiled."""

    def check_characters(self, texts: Iterable[str]) -> None:
        """Raise RequestInvalid if the texts of a grammar have too many characters."""
        size = sum(map(len, texts))
        if size > self.max_characters:
            raise RequestInvalid(
                f"the grammar has {size} characters, and at most {self.max_characters} are allowed"
            )
