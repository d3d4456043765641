"""The bound on open connections, which no single owner can use up."""

from __future__ import annotations

from collections import Counter


class Crowd:
    """Open connections by owner. One owner may have three quarters of what others leave of ``most``: a client
    that opens as many as it can does not shut others out, and all clients behind one proxy are one owner."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._of: Counter[str] = Counter()
        self._all = 0

    def enter(self, owner: str) -> bool:
        """Count a connection, if there is room for it; returns whether there is."""
        own = self._of[owner]
        left = self.most - (self._all - own)
        if own >= -(-3 * left // 4):
            return False
        self._of[owner] += 1
        self._all += 1
        return True

    def leave(self, owner: str) -> None:
        """Count one less."""
        self._of[owner] -= 1
        self._all -= 1
        if not self._of[owner]:
            del self._of[owner]
