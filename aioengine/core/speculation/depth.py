"""How many tokens to propose: as many as are worth the time that it takes to check them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

MAX_DEPTH = 16
"""Tokens proposed to a request in one step."""
LONG_MATCH = 8
"""From so many equal tokens on, a match counts as a long one."""
_PRIOR, _PRIOR_WEIGHT = 0.4, 2.0
_FORGET = 0.85
"""Weight that earlier trials keep when new ones come."""
_REVIVE = 0.995
"""Weight that they keep each time that nothing is proposed because of them, so that proposing is tried
again."""


class Acceptance:
    """How often a request's proposed tokens were right, apart for short and long matches.

    Each is the share of right tokens among those that were checked after only right ones, later trials
    weighing more.
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
        """A match was found, and nothing proposed."""
        kind = match >= LONG_MATCH
        self._right[kind] = self._right[kind] * _REVIVE + _PRIOR * _PRIOR_WEIGHT * (1 - _REVIVE)
        self._trials[kind] = self._trials[kind] * _REVIVE + _PRIOR_WEIGHT * (1 - _REVIVE)


class Candidate(NamedTuple):
    """Tokens that could be proposed to one request."""

    chances: Sequence[float]
    """Chance of each token to be right if those before it are."""


def allot(candidates: Sequence[Candidate], rows: int, fixed: float, room: int) -> list[int]:
    """How many tokens to propose to each, so that a step yields most tokens a second.

    A step of ``rows`` tokens takes ``fixed + rows`` units of time, and each proposed token one more. The next
    one of a request is right with the product of the chances; it is taken as long as the step's tokens a unit
    rise with it. So the more requests decode, the surer a token must be: in a large batch none is.
    """
    counts = [0] * len(candidates)
    tokens, time = float(rows), fixed + rows
    live = [(i, 1.0) for i in range(len(candidates))]
    while live:
        still = []
        for i, chance in live:
            chance *= candidates[i].chances[counts[i]]
            if room > 0 and chance * time > tokens:
                tokens, time, room = tokens + chance, time + 1, room - 1
                counts[i] += 1
                if counts[i] < len(candidates[i].chances):
                    still.append((i, chance))
        live = still
    return counts
