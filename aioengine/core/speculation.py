"""Speculation: tokens that are proposed from a request's own text, and checked all at once in one step.

Prompt lookup decoding (Apoorv Saxena, 2023, https://github.com/apoorvumang/prompt-lookup-decoding): answers
that extract, edit or quote text repeat long pieces of the prompt, so what followed an earlier occurrence of
the last tokens is proposed again: as many tokens as are worth the time to check them.

Nothing here changes an answer: a proposed token is computed together with the token before it, and kept only
if it would have been chosen anyway (greedily, or by the draw that seed and position decide). That needs
logits that do not depend on how many tokens a step computes: docs/determinism.md.
"""

from __future__ import annotations

from collections.abc import Sequence

MAX_DEPTH = 16
"""Maximum number of tokens proposed to a request in one step."""
LONG_MATCH = 8
"""A match of this many equal tokens or more counts as a long one."""
GRAM = 3
"""Number of tokens that must be the same."""
_PRIOR, _PRIOR_WEIGHT = 0.4, 2.0
_FORGET = 0.85
"""Weight that earlier trials keep when new ones come."""
_REVIVE = 0.995
"""Weight that they keep each time that nothing is proposed because of them. So proposing is tried again
later."""
_BITS = 21
"""Bits of a token's id in a key, so that keys stay small integers."""
_INDEXED_AT_ONCE = 4096
"""Tokens taken in at one step. A longer text takes several steps, because other requests wait meanwhile."""
_LONGEST = 32
"""Maximum number of tokens that a match is followed back."""


class Drafting:
    """State from which one request's drafts are made: where its text, which only grows, repeats itself, and
    how often its proposed tokens were right, separately for short and long matches. That is the share of
    right tokens among those whose predecessors were all right; later trials weigh more."""

    __slots__ = ("_back", "_end_of", "_is_long", "_known", "_right", "_trials")

    def __init__(self) -> None:
        self._end_of: dict[int, int] = {}
        """Three tokens -> the index after their latest occurrence, except at the text's end."""
        self._known = GRAM
        """Index of the next end to be taken in."""
        self._back = 0
        """Distance to the last place that was found. A copy in which single tokens differ continues there."""
        self._right = [_PRIOR * _PRIOR_WEIGHT] * 2
        self._trials = [_PRIOR_WEIGHT] * 2
        self._is_long = False
        """Whether the last draft came from a long match."""

    def find(self, tokens: Sequence[int]) -> tuple[int, int]:
        """Find an earlier occurrence of the last tokens. Returns the index after it, and how many tokens
        match; (0, 0) if there is none."""
        size = len(tokens)
        stop = min(size, self._known + _INDEXED_AT_ONCE)
        for end in range(self._known, stop):
            self._end_of[_key(tokens, end)] = end
        self._known = max(self._known, stop)
        if size < GRAM or self._known < size:
            return 0, 0
        place = self._end_of.get(_key(tokens, size), 0)
        length = _common(tokens, place)
        if self._back and (common := _common(tokens, size - self._back)) >= max(length, GRAM):
            place, length = size - self._back, common
        if place:
            self._back = size - place
        return place, length

    def draft(self, tokens: Sequence[int], limit: int) -> list[int]:
        """Return tokens that could be proposed after these."""
        place, length = self.find(tokens) if limit > 0 else (0, 0)
        self._is_long = length >= LONG_MATCH
        return copy(tokens, place, min(limit, MAX_DEPTH)) if place else []

    @property
    def chance(self) -> float:
        """The chance that a token of the last draft is right if those before it are."""
        return (self._right[self._is_long] + _PRIOR * 0.1) / (self._trials[self._is_long] + 0.1)

    def learn(self, proposed: int, right: int) -> None:
        """Learn that the first ``right`` of the ``proposed`` tokens were right."""
        self._count(_FORGET, right, min(right + 1, proposed))

    def passed_over(self) -> None:
        """Note that a match was found, but nothing was proposed."""
        self._count(_REVIVE, _PRIOR * _PRIOR_WEIGHT * (1 - _REVIVE), _PRIOR_WEIGHT * (1 - _REVIVE))

    def _count(self, keep: float, right: float, trials: float) -> None:
        kind = self._is_long
        self._right[kind] = self._right[kind] * keep + right
        self._trials[kind] = self._trials[kind] * keep + trials


def propose(
    draftings: Sequence[Drafting],
    texts: Sequence[Sequence[int]],
    limits: Sequence[int],
    fixed: float,
    room: int,
) -> list[list[int]]:
    """Return a draft for each request, often an empty one, with at most as many tokens as ``limits`` say.

    ``fixed`` is a step's fixed time, in units of the time for one token. ``room`` is how many tokens may be
    proposed in all.
    """
    drafts = [one.draft(text, limit) for one, text, limit in zip(draftings, texts, limits, strict=True)]
    places = [place for place, draft in enumerate(drafts) if draft]
    chances = [draftings[place].chance for place in places]
    counts = allot(chances, [len(drafts[place]) for place in places], len(drafts), fixed, room)
    for place, count in zip(places, counts, strict=True):
        del drafts[place][count:]
        if count == 0:
            draftings[place].passed_over()
    return drafts


def allot(chances: Sequence[float], most: Sequence[int], rows: int, fixed: float, room: int) -> list[int]:
    """Return how many tokens to propose to each request, at most ``most``, so that a step yields most tokens
    a second. ``chances`` are those of each token to be right if the tokens before it are.

    A step of ``rows`` tokens takes ``fixed + rows`` units of time, and each proposed token takes one more. A
    request's next token is right with the product of the chances up to it. It is proposed as long as it
    raises the step's tokens per unit of time. So the more requests decode, the more likely a token must be;
    in a large batch none is likely enough.
    """
    counts = [0] * len(chances)
    tokens, time = float(rows), fixed + rows
    live = [(place, 1.0) for place in range(len(chances))]
    while live:
        still = []
        for place, chance in live:
            chance *= chances[place]
            if room > 0 and chance * time > tokens:
                tokens, time, room = tokens + chance, time + 1, room - 1
                counts[place] += 1
                if counts[place] < most[place]:
                    still.append((place, chance))
        live = still
    return counts


def copy(tokens: Sequence[int], place: int, count: int) -> list[int]:
    """Return ``count`` tokens from ``place`` on. At the end of the text, the copy continues with its own
    tokens."""
    draft = list(tokens[place : place + count])
    period = len(tokens) - place
    while len(draft) < count:
        draft.append(draft[len(draft) - period])
    return draft


def _key(tokens: Sequence[int], end: int) -> int:
    return (tokens[end - 3] << 2 * _BITS) | (tokens[end - 2] << _BITS) | tokens[end - 1]


def _common(tokens: Sequence[int], place: int) -> int:
    """Count the tokens before ``place`` that are the same as the last ones."""
    size, most, length = len(tokens), min(place, _LONGEST), 0
    while length < most and tokens[place - 1 - length] == tokens[size - 1 - length]:
        length += 1
    return length
