"""Decides how many tokens to propose: as many as are worth the time to check them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from aioengine.core.speculation.prompt_lookup import PromptLookup

MAX_DEPTH = 16
"""Maximum number of tokens proposed to a request in one step."""
LONG_MATCH = 8
"""A match of this many equal tokens or more counts as a long one."""
_PRIOR, _PRIOR_WEIGHT = 0.4, 2.0
_FORGET = 0.85
"""Weight that earlier trials keep when new ones come."""
_REVIVE = 0.995
"""Weight that they keep each time that nothing is proposed because of them. So proposing is tried again
later."""


class Acceptance:
    """How often a request's proposed tokens were right, separately for short and long matches.

    Each is the share of right tokens among those whose predecessors were all right. Later trials weigh more.
    """

    __slots__ = ("_right", "_trials")

    def __init__(self) -> None:
        self._right = [_PRIOR * _PRIOR_WEIGHT] * 2
        self._trials = [_PRIOR_WEIGHT] * 2

    def chance(self, match: int) -> float:
        """Return the chance that a token proposed after a match of this length is right."""
        kind = match >= LONG_MATCH
        return (self._right[kind] + _PRIOR * 0.1) / (self._trials[kind] + 0.1)

    def learn(self, match: int, proposed: int, right: int) -> None:
        kind = match >= LONG_MATCH
        self._right[kind] = self._right[kind] * _FORGET + right
        self._trials[kind] = self._trials[kind] * _FORGET + min(right + 1, proposed)

    def passed_over(self, match: int) -> None:
        """Note that a match was found, but nothing was proposed."""
        kind = match >= LONG_MATCH
        self._right[kind] = self._right[kind] * _REVIVE + _PRIOR * _PRIOR_WEIGHT * (1 - _REVIVE)
        self._trials[kind] = self._trials[kind] * _REVIVE + _PRIOR_WEIGHT * (1 - _REVIVE)


class Drafting:
    """State from which one request's drafts are made; it belongs to the request."""

    __slots__ = ("acceptance", "lookup", "match")

    def __init__(self) -> None:
        self.acceptance = Acceptance()
        self.lookup = PromptLookup()
        self.match = 0
        """Length of the match that the last draft came from."""


class Candidate(NamedTuple):
    """Tokens that could be proposed to one request."""

    chance: float
    """Chance of each token to be right if those before it are."""
    tokens: int


def allot(candidates: Sequence[Candidate], rows: int, fixed: float, room: int) -> list[int]:
    """Return how many tokens to propose to each candidate, so that a step yields most tokens a second.

    A step of ``rows`` tokens takes ``fixed + rows`` units of time, and each proposed token takes one more. A
    request's next token is right with the product of the chances up to it. It is proposed as long as it
    raises the step's tokens per unit of time. So the more requests decode, the more likely a token must be;
    in a large batch none is likely enough.
    """
    counts = [0] * len(candidates)
    tokens, time = float(rows), fixed + rows
    live = [(i, 1.0) for i in range(len(candidates))]
    while live:
        still = []
        for i, chance in live:
            chance *= candidates[i].chance
            if room > 0 and chance * time > tokens:
                tokens, time, room = tokens + chance, time + 1, room - 1
                counts[i] += 1
                if counts[i] < candidates[i].tokens:
                    still.append((i, chance))
        live = still
    return counts
