"""Drafts from earlier outputs of the same adapter and tenant, in bounded memory.

SuffixDecoding (Oliaro, Jia, Campos and Qiao, "SuffixDecoding: Extreme Speculative Decoding for Emerging AI
Applications", 2024, arXiv:2411.04975) drafts from suffix trees over a request's own text and over earlier
outputs, along what followed most often. Here automata take the place of trees. Outputs never propose tokens
to another tenant, another adapter or another cache salt, because the speed of an answer would tell what is in
them.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable, Sequence

from aioengine.core.speculation.automaton import SuffixAutomaton

MAX_TOKENS = 2**18
"""Maximum tokens of all outputs that are kept; a token takes 50 to 200 bytes."""
MAX_TOKENS_EACH = 2**15
"""Maximum tokens of one adapter and tenant. When they are reached, the outputs stay until as many newer
tokens have come."""
_TAKEN_IN_AT_ONCE = 256
"""Tokens of ended requests that are taken in at each step."""
_MAX_PENDING = 2**15
"""Tokens of requests that have ended and wait to be taken in; further ones are left out."""
_REMATCHED = 32
"""Number of last tokens that are matched again to find a text's place in other outputs."""

Key = Hashable


class Place:
    """Place of a text's end in the outputs."""

    __slots__ = ("automaton", "known", "length", "state")

    def __init__(self) -> None:
        self.automaton: SuffixAutomaton | None = None
        self.state = self.length = self.known = 0

    def follow(self, automaton: SuffixAutomaton, tokens: Sequence[int]) -> int:
        """Return how many of the last tokens ``automaton`` contains as one piece."""
        if automaton is not self.automaton or len(tokens) - self.known > _REMATCHED:
            self.automaton, self.state, self.length = automaton, 0, 0
            self.known = max(0, len(tokens) - _REMATCHED)
        for token in tokens[self.known :]:
            self.state, self.length = automaton.step(self.state, self.length, token)
        self.known = len(tokens)
        return self.length


class OutputPlaces:
    """A request's places in the newer and the older outputs."""

    __slots__ = ("places",)

    def __init__(self) -> None:
        self.places = (Place(), Place())


class EarlierOutputs:
    """Outputs by key. A request with another key never gets tokens from them."""

    def __init__(self, max_tokens: int = MAX_TOKENS, max_tokens_each: int = MAX_TOKENS_EACH) -> None:
        self._max_tokens = max_tokens
        self._half = max(1, max_tokens_each // 2)
        self._kept: OrderedDict[Key, list[SuffixAutomaton]] = OrderedDict()
        """The newer outputs of each key, then the older; the least recently used key first."""
        self.tokens = 0
        """Number of tokens that are kept."""
        self._pending: deque[tuple[Key, list[int]]] = deque()
        self._pending_tokens = 0
        self._begun = False
        """Whether a part of the first pending output has been taken in."""

    def ended(self, key: Key, output: Sequence[int]) -> None:
        """Note that a request with this output has ended."""
        if self._pending_tokens + len(output) <= _MAX_PENDING and len(output) > 1:
            self._pending.append((key, list(reversed(output))))
            self._pending_tokens += len(output)

    def take_in(self) -> None:
        """Take in some tokens of ended requests. Call it in each step."""
        most = _TAKEN_IN_AT_ONCE
        while self._pending and most > 0:
            key, left = self._pending[0]
            newer = self._newer(key)
            if not self._begun or newer.tokens == 0:
                newer.begin_text()
            self._begun = True
            for _ in range(min(most, len(left), self._half - newer.tokens)):
                newer.add(left.pop())
                self.tokens += 1
                self._pending_tokens -= 1
                most -= 1
            if not left:
                self._pending.popleft()
                self._begun = False

    def find(self, key: Key, places: OutputPlaces, tokens: Sequence[int]) -> tuple[Place | None, int]:
        """Return the place with the longest common end, and the length of that end."""
        parts = self._kept.get(key)
        if parts is None:
            return None, 0
        self._kept.move_to_end(key)
        found = [
            (place.follow(part, tokens), place) for part, place in zip(parts, places.places, strict=False)
        ]
        length, best = max(found, key=lambda pair: pair[0])
        return best, length

    def _newer(self, key: Key) -> SuffixAutomaton:
        """Return the automaton to which this key's outputs are added, with room for at least one token."""
        parts = self._kept.setdefault(key, [SuffixAutomaton()])
        self._kept.move_to_end(key)
        if parts[0].tokens >= self._half:
            self._forget(parts[1:])
            parts[:] = [SuffixAutomaton(), parts[0]]
        while len(self._kept) > 1 and self.tokens >= self._max_tokens:
            self._forget(self._kept.popitem(last=False)[1])
        return parts[0]

    def _forget(self, parts: Sequence[SuffixAutomaton]) -> None:
        self.tokens -= sum(part.tokens for part in parts)


def follow(place: Place, count: int) -> tuple[list[int], list[float]]:
    """Return up to ``count`` tokens that followed most often, and the share of occurrences that each
    followed."""
    assert place.automaton is not None
    draft: list[int] = []
    shares: list[float] = []
    state = place.state
    while len(draft) < count:
        token, state, share = place.automaton.likely(state)
        if token < 0:
            break
        draft.append(token)
        shares.append(share)
    return draft, shares
