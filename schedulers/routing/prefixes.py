"""Estimates which replicas have cached which beginnings of prompts: hashes, and a bounded index of them."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from hashlib import blake2b

PREFIX_BLOCK = 256
"""Tokens for each hash: more than in a KV block, so that a long prompt has few hashes."""
MAX_HASHES = 64
"""Maximum number of leading blocks of a prompt that are hashed."""


def prefix_hashes(tokens: Sequence[int], adapter: str | None, *, salt: str | None = None) -> tuple[int, ...]:
    """Return chained 64-bit hashes of the first full blocks of a prompt. Each stands for all tokens up to its
    end, for the adapter and for the salt, because prefixes are shared only within these."""
    parent = repr((adapter, salt)).encode()
    found = []
    for start in range(0, min(len(tokens) // PREFIX_BLOCK, MAX_HASHES) * PREFIX_BLOCK, PREFIX_BLOCK):
        block = array("q", tokens[start : start + PREFIX_BLOCK]).tobytes()
        parent = blake2b(parent + block, digest_size=8).digest()
        found.append(int.from_bytes(parent, "little"))
    return tuple(found)


class PrefixIndex:
    """Remembers the blocks of prompts that each replica was sent, the ``most`` that it used last."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._where: dict[int, dict[str, int]] = {}
        """Place of a block in its prompt, by hash and replica."""
        self._recent: dict[str, OrderedDict[int, None]] = {}
        """Hashes of each replica, the one that was used longest ago first."""

    def add(self, replica: str, prefixes: Sequence[int]) -> None:
        """Note that a prompt was sent to the replica now."""
        recent = self._recent.setdefault(replica, OrderedDict())
        # The last block first, so that the end of a prompt is forgotten before its beginning.
        for blocks in range(len(prefixes), 0, -1):
            digest = prefixes[blocks - 1]
            recent[digest] = None
            recent.move_to_end(digest)
            self._where.setdefault(digest, {})[replica] = blocks
            if len(recent) > self._most:
                self._forget(recent.popitem(last=False)[0], replica)

    def leave(self, replica: str) -> None:
        """Forget a replica's blocks."""
        for digest in self._recent.pop(replica, ()):
            self._forget(digest, replica)

    def lookup(self, prefixes: Sequence[int]) -> Mapping[str, int]:
        """Return by replica how many of these blocks it has, the first ones; replicas with none are left
        out."""
        found: dict[str, int] = {}
        for digest in reversed(prefixes):
            there = self._where.get(digest)
            if there is not None:
                found = {**there, **found}
        return found

    def __len__(self) -> int:
        """Distinct blocks that are remembered."""
        return len(self._where)

    def _forget(self, digest: int, replica: str) -> None:
        del self._where[digest][replica]
        if not self._where[digest]:
            del self._where[digest]
