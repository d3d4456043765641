"""Drafting: the state from which one request's drafts are made."""

from __future__ import annotations

from aioengine.core.speculation.depth import Acceptance
from aioengine.core.speculation.prompt_lookup import PromptLookup


class Drafting:
    """State from which one request's drafts are made; it belongs to the request."""

    __slots__ = ("acceptance", "lookup", "match")

    def __init__(self) -> None:
        self.acceptance = Acceptance()
        self.lookup = PromptLookup()
        self.match = 0
        """Length of the match that the last draft came from."""
