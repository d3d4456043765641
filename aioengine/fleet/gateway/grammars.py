"""Guided decoding in a fleet: the grammar's text is sent to the replica of its request, and compiled
there."""

from __future__ import annotations

from collections.abc import Sequence

from aioengine.errors import RequestInvalid
from aioengine.grammars.limits import GrammarLimits


class SentGrammar:
    """Stand-in for a constraint until its request has reached a replica."""

    def __init__(self, text: str) -> None:
        self.text = text

    def allowed(self, output: Sequence[int]) -> bytes:
        raise RequestInvalid("this constraint belongs to a fleet: make one with the engine's own Guide")


class FleetGrammars:
    """A :class:`~aioengine.runtime.client.GrammarCompiler`."""

    def __init__(self, limits: GrammarLimits | None) -> None:
        self.limits = GrammarLimits() if limits is None else limits

    async def constraint(self, text: str, tenant: str | None) -> SentGrammar:
        """Make a constraint that the replica compiles. An error in the grammar becomes the request's
        error."""
        self.limits.check_characters((text,))
        return SentGrammar(text)
