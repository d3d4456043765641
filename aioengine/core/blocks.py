"""Paged KV blocks with reference counts and prefix caching.

A block holds the keys and values of ``block_size`` tokens in every layer (paging after Kwon et al.,
"Efficient Memory Management for LLM Serving with PagedAttention", 2023). A *full* block can be shared:
its identity is the hash of everything that it depends on (the adapter's content, all earlier tokens and its
own tokens) and of its request's salt. So blocks of different adapters, or of different contents of one
adapter, can never be confused, and a request learns nothing about prompts that were sent with another salt.
Freed blocks keep their contents until they are reused, the least recently freed first. Those with pinned
contents (:class:`PrefixPins`) are reused only when no others are free.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Container, Sequence
from hashlib import blake2b
from heapq import heapify, heapreplace
from itertools import chain
from typing import NamedTuple

Tenant = str | None


class _Pin(NamedTuple):
    owner: Tenant
    seconds: float
    until: float


class PrefixPins:
    """Pinned contents, by hash: ``most`` in all and ``most_per_tenant`` of each tenant.

    A pin outlives the request that computed the block, and ends a number of seconds after its last use. The
    bounds are shared as waiting places are: a tenant may have all pins while nobody else has any; when others
    pin, the tenant with the most loses those that it has used least recently. The pins of a prefix are lost
    from its end, because a block is of use only with all blocks before it.
    """

    def __init__(self, most: int, most_per_tenant: int | None = None) -> None:
        self.most = most
        self.most_per_tenant = most if most_per_tenant is None else min(most, most_per_tenant)
        self._pins: dict[bytes, _Pin] = {}
        self._of: dict[Tenant, OrderedDict[bytes, None]] = {}
        """Each tenant's pins, the least recently used first."""
        self.next_end: float | None = None
        """A time before which no pin ends."""

    def __len__(self) -> int:
        return len(self._pins)

    def __contains__(self, digest: object) -> bool:
        return digest in self._pins

    def count(self, tenant: Tenant) -> int:
        return len(self._of.get(tenant, ()))

    def pin(self, tenant: Tenant, prefix: Sequence[bytes], seconds: float, now: float) -> list[bytes]:
        """Pin as many blocks of ``prefix``, from its first on, as the bounds allow, until ``seconds`` after
        their last use. A block that is pinned already keeps the later end, and from now on it counts as this
        tenant's. Returns the blocks that are not pinned any more."""
        for digest in reversed(prefix[: self.most_per_tenant]):
            old = self.remove(digest) or _Pin(tenant, 0.0, 0.0)
            until = max(old.until, now + seconds)
            self._pins[digest] = _Pin(tenant, max(old.seconds, seconds), until)
            self._of.setdefault(tenant, OrderedDict())[digest] = None
            self.next_end = until if self.next_end is None else min(self.next_end, until)
        lost = [self._lose(tenant) for _ in range(self.count(tenant) - self.most_per_tenant)]
        over = len(self._pins) - self.most
        if over > 0:  # each from the tenant that has the most then; the newcomer loses first among equals
            tenants = list(self._of)
            sizes = [(-self.count(who), who != tenant, place) for place, who in enumerate(tenants)]
            heapify(sizes)
            for _ in range(over):
                size, other, place = sizes[0]
                lost.append(self._lose(tenants[place]))
                heapreplace(sizes, (size + 1, other, place))
        return lost

    def use(self, prefix: Sequence[bytes], now: float) -> None:
        """Note a use of a prefix: the ends of its pins move."""
        for digest in reversed(prefix) if self._pins else ():
            pin = self._pins.get(digest)
            if pin is not None:
                self._pins[digest] = pin._replace(until=max(pin.until, now + pin.seconds))
                self._of[pin.owner].move_to_end(digest)

    def expire(self, now: float) -> list[bytes]:
        """Remove the pins that have ended, and return their blocks."""
        if self.next_end is None or self.next_end > now:
            return []
        ended = [digest for digest, pin in self._pins.items() if pin.until <= now]
        for digest in ended:
            self.remove(digest)
        self.next_end = min((pin.until for pin in self._pins.values()), default=None)
        return ended

    def remove(self, digest: bytes) -> _Pin | None:
        """Remove a pin, if there is one, because its block is reused. Returns it."""
        pin = self._pins.pop(digest, None)
        if pin is not None:
            own = self._of[pin.owner]
            del own[digest]
            if not own:
                del self._of[pin.owner]
        return pin

    def clear(self) -> None:
        self._pins.clear()
        self._of.clear()
        self.next_end = None

    def _lose(self, tenant: Tenant) -> bytes:
        """Remove the pin that a tenant has used least recently."""
        digest = next(iter(self._of[tenant]))
        self.remove(digest)
        return digest

    def check(self) -> None:
        """Assert that all counts agree and that the bounds hold."""
        owned = {digest: tenant for tenant, own in self._of.items() for digest in own}
        assert owned == {digest: pin.owner for digest, pin in self._pins.items()}
        assert all(self._of.values())
        assert sum(map(len, self._of.values())) == len(self._pins) <= self.most
        assert all(len(own) <= self.most_per_tenant for own in self._of.values())
        assert all(self.next_end is not None and self.next_end <= pin.until for pin in self._pins.values())


class BlockManager:
    """Hands out block ids ``0..num_blocks-1``. ``can_allocate`` and ``allocate`` come in pairs."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        prefix_caching: bool = True,
        window: int | None = None,
        pins: PrefixPins | None = None,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self.window = window
        """Tokens that every layer looks back at most; None: some layer sees all."""
        self._refs = [0] * num_blocks
        """Holders of each block, where blocks can be shared: with prefix caching."""
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._empty = list(range(num_blocks))
        """Free blocks without cached contents. They are reused before all others, the last one first."""
        self._cached: OrderedDict[int, None] = OrderedDict()
        """Free blocks whose contents are cached and not pinned, in the order in which they are reused."""
        self._kept: OrderedDict[int, None] = OrderedDict()
        """Free blocks with pinned contents; they are reused after the others."""
        self.pins = PrefixPins(0) if pins is None else pins
        """Pins on cached contents."""
        self.pins_lost = 0
        """Number of pinned blocks that were reused, because requests needed them."""

    @property
    def num_free(self) -> int:
        """Number of blocks that no sequence references; their contents may still be cached."""
        return len(self._empty) + len(self._cached) + len(self._kept)

    @property
    def free(self) -> set[int]:
        """These blocks, for checks."""
        return {*self._empty, *self._cached, *self._kept}

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def hash_blocks(
        self, key: bytes, tokens: Sequence[int], known: Sequence[bytes], turn: int = 0, rest_key: bytes = b""
    ) -> list[bytes]:
        """Return the chained hashes of all full blocks of ``tokens``; ``known`` is a prefix that is already
        hashed. ``key`` stands for everything else that two sequences must share to share blocks. If ``turn``
        is not 0, ``rest_key`` is hashed too, for the blocks from that one on."""
        hashes, size = list(known), self.block_size
        parent = hashes[-1] if hashes else blake2b(key, digest_size=16).digest()
        for index in range(len(hashes), len(tokens) // size):
            if turn and index == turn:
                parent = blake2b(parent + rest_key, digest_size=16, person=b"turn").digest()
            chunk = array("q", tokens[index * size : (index + 1) * size])
            parent = blake2b(parent + chunk.tobytes(), digest_size=16).digest()
            hashes.append(parent)
        return hashes

    def match(self, hashes: Sequence[bytes], max_tokens: int) -> list[int]:
        """Find cached blocks for the longest known prefix, covering at most ``max_tokens`` tokens. Of those
        that are :meth:`unseen` behind it, any may be missing: the first block is in their places."""
        if not self.prefix_caching:
            return []
        found: list[int] = []
        matched, missing = 0, 0
        for index, digest in enumerate(hashes[: max_tokens // self.block_size]):
            block = self._block_of.get(digest)
            if block is None:
                if self.window is None or not found:
                    break
                block, missing = found[0], index
            found.append(block)
            if missing <= self.unseen(len(found) * self.block_size):
                matched = len(found)
        return found[:matched]

    def can_allocate(self, new: int, shared: Sequence[int] = ()) -> bool:
        """Whether ``new`` blocks are free beside the ``shared`` ones from the cache."""
        return self.num_free - sum(self._refs[block] == 0 for block in shared) >= new

    def kept_beside(self, shared: Sequence[int]) -> int:
        """Count the free blocks with pinned contents that are not among ``shared``."""
        kept = self._kept
        return len(kept) - sum(block in kept for block in shared) if kept else 0

    def allocate(self, new: int, shared: Sequence[int] = ()) -> list[int]:
        """Take a reference on each of ``shared`` and on ``new`` fresh blocks; returns their ids."""
        assert self.can_allocate(new, shared)
        if not self.prefix_caching:
            return self._take_free(new)
        refs = self._refs
        for block in shared:
            if refs[block] == 0:
                del self._list_of(block)[block]
            refs[block] += 1
        fresh = self._take_free(new)
        for block in fresh:
            refs[block] = 1
        return [*shared, *fresh] if shared else fresh

    def _take_free(self, count: int) -> list[int]:
        """Take the free blocks that are reused next, and forget their contents."""
        found = self._empty[-count:] if count else []
        del self._empty[len(self._empty) - len(found) :]
        found.reverse()
        while len(found) < count:
            pinned = not self._cached
            block, _ = (self._kept if pinned else self._cached).popitem(last=False)
            digest = self._hash_of[block]
            assert digest is not None
            if pinned:
                self.pins.remove(digest)
                self.pins_lost += 1
            self._hash_of[block] = None
            del self._block_of[digest]
            found.append(block)
        return found

    def commit(self, block: int, digest: bytes) -> None:
        """Enter a full, computed block in the prefix cache, unless an equal one is there."""
        if self.prefix_caching and digest not in self._block_of and self._hash_of[block] is None:
            self._hash_of[block] = digest
            self._block_of[digest] = block

    def release(self, blocks: Sequence[int]) -> None:
        """Give back one reference on each block. The last blocks of a sequence are reused before its first,
        because a short prefix is worth more than a long one."""
        if not self.prefix_caching:  # each has one holder, and no contents that are known
            self._empty += reversed(blocks)
            assert len(self._empty) <= self.num_blocks, "a block was released twice"
            return
        refs, hash_of = self._refs, self._hash_of
        for block in reversed(blocks):
            left = refs[block] - 1
            assert left >= 0, f"block {block} released twice"
            refs[block] = left
            if left == 0:
                if hash_of[block] is None:
                    self._empty.append(block)
                else:
                    self._list_of(block)[block] = None

    # Pins

    def _list_of(self, block: int) -> OrderedDict[int, None]:
        """Return the list that a free block with cached contents is in."""
        return self._kept if self._hash_of[block] in self.pins else self._cached

    def pin(self, tenant: str | None, hashes: Sequence[bytes], seconds: float, now: float) -> int:
        """Keep the contents of a prefix until ``seconds`` after its last use, as far as they are cached and
        the bounds on pins allow. Returns how many of its blocks, from the first on, are pinned then. Those
        that are :meth:`unseen` behind it count, although they need no pin."""
        unseen = self.unseen(len(hashes) * self.block_size)
        needed = [*hashes[:1], *hashes[1 + unseen :]]
        prefix = needed[: _leading(needed, self._block_of)]
        self._unpinned(self.pins.pin(tenant, prefix, seconds, now))
        count = _leading(prefix, self.pins)
        for digest in reversed(prefix[:count]):
            block = self._block_of[digest]
            if block in self._cached:
                del self._cached[block]
                self._kept[block] = None
        return count + unseen if count == len(needed) else min(count, 1) if unseen else count

    def expire(self, now: float) -> None:
        """End the pins whose time is over."""
        self._unpinned(self.pins.expire(now))

    def _unpinned(self, lost: Sequence[bytes]) -> None:
        for digest in lost:
            block = self._block_of[digest]
            if block in self._kept:
                del self._kept[block]
                self._cached[block] = None

    def unseen(self, computed: int) -> int:
        """Count a sequence's blocks after the first that no layer sees any more when ``computed`` tokens are
        computed."""
        if self.window is None:
            return 0
        return max(0, (computed + 1 - self.window) // self.block_size - 1)

    def give_back(self, table: list[int], known: int, computed: int) -> int:
        """Give back the blocks of ``table`` that are :meth:`unseen`, of which ``known`` are already, and
        return how many they are now. The first block takes their places: kernels read it there, to no
        effect, and what it holds is finite."""
        unseen = self.unseen(computed)
        if unseen > known:
            self.release(table[1 + known : 1 + unseen])
            table[1 + known : 1 + unseen] = table[:1] * (unseen - known)
        return max(unseen, known)

    def forget(self) -> None:
        """Forget all contents; no block may be referenced."""
        assert self.num_free == self.num_blocks
        self.pins.clear()
        self._empty = [*reversed([*self._cached, *self._kept]), *self._empty]
        self._cached.clear()
        self._kept.clear()
        self._hash_of = [None] * self.num_blocks
        self._block_of.clear()

    def check(self, held: Sequence[Sequence[int]]) -> None:
        """Assert that what is held is exactly ``held`` (one list for each holder)."""
        taken = Counter(chain.from_iterable(held))
        if self.prefix_caching:
            counts = [taken[block] for block in range(self.num_blocks)]
            assert counts == self._refs, "block reference counts do not match their holders"
        assert self.prefix_caching or taken.total() == len(taken), "a block has two holders"
        free = {*range(self.num_blocks)}.difference(taken)
        assert len(free) == self.num_free and free == self.free
        assert {b for b in free if self._hash_of[b] is None} == {*self._empty}
        assert all(self._hash_of[b] == digest for digest, b in self._block_of.items())
        self.pins.check()
        pinned = {b for digest, b in self._block_of.items() if digest in self.pins}
        assert len(pinned) == len(self.pins), "what is pinned is not cached"
        assert self._kept.keys() == pinned & free


def _leading(prefix: Sequence[bytes], known: Container[bytes]) -> int:
    """Count the hashes from the first on that are known."""
    return next((i for i, digest in enumerate(prefix) if digest not in known), len(prefix))
