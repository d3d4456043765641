"""Drafts from a request's own text: the tokens that followed an earlier occurrence of its last tokens.

Prompt lookup decoding (Apoorv Saxena, 2023, https://github.com/apoorvumang/prompt-lookup-decoding): answers
that extract, edit or quote text repeat long pieces of the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

GRAM = 3
"""Number of tokens that must be the same."""
_BITS = 21
"""Bits of a token's id in a key, so that keys stay small integers."""
_INDEXED_AT_ONCE = 4096
"""Tokens taken in at one step. A longer text takes several steps, because other requests wait meanwhile."""
_LONGEST = 32
"""Maximum number of tokens that a match is followed back."""


class PromptLookup:
    """Finds an earlier place in a text that only grows."""

    __slots__ = ("_back", "_end_of", "_known")

    def __init__(self) -> None:
        self._end_of: dict[int, int] = {}
        """Three tokens -> the index after their latest occurrence, except at the text's end."""
        self._known = GRAM
        """Index of the next end to be taken in."""
        self._back = 0
        """Distance to the last place that was found. A copy in which single tokens differ continues there."""

    def find(self, tokens: Sequence[int]) -> tuple[int, int]:
        """Find an earlier occurrence of the last tokens. Returns the index after it, and how many tokens
        match; (0, 0) if there is none."""
        size = len(tokens)
        end_of = self._end_of
        stop = min(size, self._known + _INDEXED_AT_ONCE)
        for end in range(self._known, stop):
            end_of[_key(tokens, end)] = end
        self._known = max(self._known, stop)
        if size < GRAM or self._known < size:
            return 0, 0
        place = end_of.get(_key(tokens, size), 0)
        length = _common(tokens, place)
        if self._back:
            going_on = size - self._back
            common = _common(tokens, going_on)
            if common >= max(length, GRAM):
                place, length = going_on, common
        if place:
            self._back = size - place
        return place, length


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
    size, most = len(tokens), min(place, _LONGEST)
    length = 0
    while length < most and tokens[place - 1 - length] == tokens[size - 1 - length]:
        length += 1
    return length
