"""A suffix automaton over several texts: which of their pieces a text ends with, and what followed.

Blumer et al., "The smallest automaton recognizing the subwords of a text", Theoretical Computer Science 40
(1985): built token by token in amortized constant time, with at most two states for each token.
"""

from __future__ import annotations

from array import array

_COUNTED = 64
"""Number of suffixes, the longest first, that a new token is counted for. Without a bound, a text that
repeats one token would have one suffix for each of its tokens."""

_MOST_SUCCESSORS = 256
"""After a text that has been followed by this many different tokens, none of them is likely, and comparing
them would take long in each step."""


class SuffixAutomaton:
    """The automaton. States are numbers; 0 is the empty text. Most states have one successor, and no
    dictionary."""

    def __init__(self) -> None:
        self.tokens = 0
        """Number of tokens in all texts."""
        self._length = array("i", [0])
        self._link = array("i", [-1])
        self._count = array("i", [0])
        self._token = array("i", [-1])
        """The token of the only transition, -1 without one, -2 with several."""
        self._target = array("i", [0])
        self._several: dict[int, dict[int, int]] = {}
        self._last = 0

    def begin_text(self) -> None:
        """Begin a new text, which does not follow the one before."""
        self._last = 0

    def add(self, token: int) -> None:
        self.tokens += 1
        self._last = self._extend(self._last, token)
        state = self._last
        for _ in range(_COUNTED):
            if state <= 0:
                break
            self._count[state] += 1
            state = self._link[state]

    def step(self, state: int, length: int, token: int) -> tuple[int, int]:
        """Add ``token`` to a text. Takes and returns the longest known piece that the text ends with, as its
        state and length."""
        link, lengths = self._link, self._length
        while state and length <= lengths[link[state]]:  # states have been split since
            state = link[state]
        while True:
            target = self._next(state, token)
            if target >= 0:
                return target, length + 1
            if state == 0:
                return 0, 0
            state = link[state]
            length = lengths[state]

    def likely(self, state: int) -> tuple[int, int, float]:
        """Return the token that followed most often, the state after it, and the share of occurrences that it
        followed. The token is -1 if none followed, or too many different ones."""
        token = self._token[state]
        if token == -1 or (token == -2 and len(self._several[state]) > _MOST_SUCCESSORS):
            return -1, 0, 0.0
        if token == -2:
            found = self._several[state]
            count = self._count
            token = max(found, key=lambda t: (count[found[t]], t))
            target, among = found[token], sum(count[s] for s in found.values())
        else:
            target = self._target[state]
            among = max(self._count[state], 1)
        return token, target, min(1.0, max(self._count[target], 1) / max(among, 1))

    def _next(self, state: int, token: int) -> int:
        only = self._token[state]
        if only == token:
            return self._target[state]
        return self._several[state].get(token, -1) if only == -2 else -1

    def _set(self, state: int, token: int, target: int) -> None:
        only = self._token[state]
        if only in (-1, token):
            self._token[state], self._target[state] = token, target
        elif only == -2:
            self._several[state][token] = target
        else:
            self._several[state] = {only: self._target[state], token: target}
            self._token[state] = -2

    def _new(self, length: int, link: int, count: int) -> int:
        self._length.append(length)
        self._link.append(link)
        self._count.append(count)
        self._token.append(-1)
        self._target.append(0)
        return len(self._length) - 1

    def _split(self, state: int, token: int, found: int) -> int:
        """Make a new state for the shorter ones of ``found``'s pieces, which ``state`` leads to."""
        clone = self._new(self._length[state] + 1, self._link[found], self._count[found])
        self._token[clone], self._target[clone] = self._token[found], self._target[found]
        if self._token[found] == -2:
            self._several[clone] = dict(self._several[found])
        self._link[found] = clone
        while state >= 0 and self._next(state, token) == found:
            self._set(state, token, clone)
            state = self._link[state]
        return clone

    def _extend(self, last: int, token: int) -> int:
        """Return the state after ``last`` and ``token``, which earlier texts may have made already."""
        found = self._next(last, token)
        if found >= 0:
            if self._length[found] == self._length[last] + 1:
                return found
            return self._split(last, token, found)
        new = self._new(self._length[last] + 1, 0, 0)
        state = last
        while state >= 0 and self._next(state, token) < 0:
            self._set(state, token, new)
            state = self._link[state]
        if state >= 0:
            found = self._next(state, token)
            if self._length[found] == self._length[state] + 1:
                self._link[new] = found
            else:
                self._link[new] = self._split(state, token, found)
        return new
