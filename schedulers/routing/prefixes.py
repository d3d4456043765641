"""Estimates which replicas have cached or pinned which prompt prefixes: hashes, and bounded indexes."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from hashlib import blake2b

from aioengine.schedulers.routing.interface import PinnedPrefix

PREFIX_BLOCK = 256
"""Tokens for each hash: more than in a KV block, so that a long prompt has few hashes."""
MAX_HASHES = 64
"""Maximum number of leading blocks of a prompt that are hashed."""


def prefix_hashes(
    tokens: Sequence[int], adapter: str | None, *, salt: str | None = None, block: int = PREFIX_BLOCK
) -> tuple[int, ...]:
    """Return chained 64-bit hashes of the first full blocks of a prompt. Each stands for all tokens up to its
    end, for the adapter and for the salt, because prefixes are shared only within these."""
    parent = blake2b(repr((adapter, salt)).encode(), digest_size=8).digest()
    found = []
    for start in range(0, min(len(tokens) // block, MAX_HASHES) * block, block):
        chunk = array("q", tokens[start : start + block]).tobytes()
        parent = blake2b(parent + chunk, digest_size=8).digest()
        found.append(int.from_bytes(parent, "little"))
    return tuple(found)


def prefix_pins(
    tokens: Sequence[int],
    lengths: Sequence[tuple[int, float]],
    adapter: str | None,
    *,
    salt: str | None = None,
    block: int = PREFIX_BLOCK,
) -> tuple[PinnedPrefix, ...]:
    """Return the beginnings of a prompt that a request pins. ``lengths``: the tokens of each, and how many
    seconds it stays. Of a beginning of more than ``MAX_HASHES`` blocks only these blocks are hashed."""
    if not lengths:
        return ()
    longest = max(length for length, _ in lengths)
    hashes = prefix_hashes(tokens[:longest], adapter, salt=salt, block=block)
    found = []
    for length, seconds in lengths:
        whole = min(length, len(tokens)) // block
        if whole <= MAX_HASHES:
            rest = array("q", tokens[whole * block : length]).tobytes()
        else:
            whole, rest = MAX_HASHES, b""
        parent = hashes[whole - 1].to_bytes(8, "little") if whole else repr((adapter, salt)).encode()
        digest = blake2b(parent + rest, digest_size=8, person=b"pin").digest()
        found.append(PinnedPrefix(int.from_bytes(digest, "little"), min(length, len(tokens)), seconds))
    return tuple(found)


class PinIndex:
    """Remembers which replica has which pinned prefixes, and until when; at most ``prefixes`` of them, those
    that were used last."""

    def __init__(self, prefixes: int) -> None:
        self._most = prefixes
        self._where: OrderedDict[int, dict[str, tuple[float, int]]] = OrderedDict()
        """Time until which it stays, and its tokens, by hash and replica."""

    def add(self, replica: str, pins: Sequence[PinnedPrefix], now: float) -> None:
        """Note that a request that pins these was sent to the replica."""
        for pin in pins:
            there = self._where.setdefault(pin.digest, {})
            there[replica] = now + pin.seconds, pin.tokens
            self._where.move_to_end(pin.digest)
        while len(self._where) > self._most:
            self._where.popitem(last=False)

    def correct(self, replica: str, pins: Sequence[PinnedPrefix], tokens: int) -> None:
        """Note that the replica has pinned this many of a prompt's tokens, which may be fewer than wanted."""
        for pin in pins:
            there = self._where.get(pin.digest, {})
            if replica in there:
                there[replica] = there[replica][0], min(pin.tokens, tokens)

    def leave(self, replica: str) -> None:
        """Forget what a replica has."""
        for digest in [digest for digest, there in self._where.items() if there.pop(replica, None)]:
            if not self._where[digest]:
                del self._where[digest]

    def lookup(self, pins: Sequence[PinnedPrefix], now: float) -> Mapping[str, int]:
        """Return by replica how many tokens of these it has; replicas with none are left out."""
        found: dict[str, int] = {}
        for pin in pins:
            for replica, (until, tokens) in self._where.get(pin.digest, {}).items():
                if until >= now and tokens > found.get(replica, 0):
                    found[replica] = tokens
        return found

    def __len__(self) -> int:
        """Distinct prefixes that are remembered."""
        return len(self._where)


class PrefixIndex:
    """Remembers the prefixes that went to each replica, the most recent ``blocks`` of each."""

    def __init__(self, blocks: int) -> None:
        self._blocks = blocks
        self._where: dict[int, set[str]] = {}
        """Replicas by hash."""
        self._recent: dict[str, OrderedDict[int, None]] = {}
        """Hashes of each replica; the one that was sent longest ago is first."""

    def leave(self, replica: str) -> None:
        """Forget a replica's prefixes."""
        for digest in self._recent.pop(replica, ()):
            self._forget(digest, replica)

    def add(self, replica: str, prefixes: Sequence[int]) -> None:
        """Note that these blocks were sent to the replica."""
        recent = self._recent.setdefault(replica, OrderedDict())
        # The last block first, so that the end of a prefix is forgotten before its beginning.
        for digest in reversed(prefixes):
            recent[digest] = None
            recent.move_to_end(digest)
            self._where.setdefault(digest, set()).add(replica)
        while len(recent) > self._blocks:
            self._forget(recent.popitem(last=False)[0], replica)

    def lookup(self, prefixes: Sequence[int]) -> Mapping[str, int]:
        """Return by replica how many leading blocks it has; replicas with none are left out."""
        found: dict[str, int] = {}
        having = self._where.get(prefixes[0], set()) if prefixes else set()
        for length, digest in enumerate(prefixes[1:], 1):
            if not having:
                break
            having, before = having & self._where.get(digest, set()), having
            found |= dict.fromkeys(before - having, length)
        return found | dict.fromkeys(having, len(prefixes))

    def __len__(self) -> int:
        """Distinct hashes that are remembered."""
        return len(self._where)

    def _forget(self, digest: int, replica: str) -> None:
        self._where[digest].discard(replica)
        if not self._where[digest]:
            del self._where[digest]
