"""Estimates which replicas have cached or pinned which beginnings of prompts: hashes, and a bounded index."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from math import inf

from aioengine.schedulers.routing.interface import PinnedPrefix

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
        parent = blake2b(parent + _bytes(tokens[start : start + PREFIX_BLOCK]), digest_size=8).digest()
        found.append(int.from_bytes(parent, "little"))
    return tuple(found)


def prefix_pins(
    tokens: Sequence[int],
    lengths: Sequence[tuple[int, float]],
    adapter: str | None,
    *,
    salt: str | None = None,
) -> tuple[PinnedPrefix, ...]:
    """Return the beginnings of a prompt that a request pins. ``lengths``: the tokens of each, and how many
    seconds it stays. Of a beginning of more than ``MAX_HASHES`` blocks only these blocks are hashed."""
    found = []
    for length, seconds in lengths:
        beginning = _bytes(tokens[: min(length, MAX_HASHES * PREFIX_BLOCK)])
        digest = blake2b(repr((adapter, salt)).encode() + beginning, digest_size=8, person=b"pin").digest()
        found.append(PinnedPrefix(int.from_bytes(digest, "little"), min(length, len(tokens)), seconds))
    return tuple(found)


def _bytes(tokens: Sequence[int]) -> bytes:
    return array("q", tokens).tobytes()


class PrefixIndex:
    """Remembers the prefixes of each replica, with a length and an end, the ``most`` that it used last."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._where: dict[int, dict[str, int]] = {}
        """Lengths by hash and replica."""
        self._recent: dict[str, OrderedDict[int, float]] = {}
        """When each prefix of a replica ends, by hash; the one that was used longest ago is first."""

    def add(self, replica: str, digest: int, length: int, until: float = inf) -> None:
        """Note that a prefix was sent to the replica now."""
        recent = self._recent.setdefault(replica, OrderedDict())
        recent[digest] = until
        recent.move_to_end(digest)
        self._where.setdefault(digest, {})[replica] = length
        if len(recent) > self._most:
            self._forget(recent.popitem(last=False)[0], replica)

    def shorten(self, replica: str, digest: int, length: int) -> None:
        """Note that the replica has no more than this of a prefix."""
        there = self._where.get(digest, {})
        if replica in there:
            there[replica] = min(there[replica], length)

    def leave(self, replica: str) -> None:
        """Forget a replica's prefixes."""
        for digest in self._recent.pop(replica, ()):
            self._forget(digest, replica)

    def lookup(self, prefixes: Sequence[int]) -> Mapping[str, int]:
        """Return by replica the length of the last of these prefixes that it has; replicas with none are left
        out."""
        found: dict[str, int] = {}
        for digest in reversed(prefixes):
            there = self._where.get(digest)
            if there is not None:
                found = {**there, **found}
        return found

    def lasting(self, pins: Sequence[PinnedPrefix], now: float) -> Mapping[str, int]:
        """Return by replica the length of the longest of these prefixes that has not ended there."""
        found: dict[str, int] = {}
        for pin in pins:
            for replica, length in self._where.get(pin.digest, {}).items():
                if length > found.get(replica, 0) and self._recent[replica][pin.digest] >= now:
                    found[replica] = length
        return found

    def __len__(self) -> int:
        """Distinct prefixes that are remembered."""
        return len(self._where)

    def _forget(self, digest: int, replica: str) -> None:
        del self._where[digest][replica]
        if not self._where[digest]:
            del self._where[digest]
