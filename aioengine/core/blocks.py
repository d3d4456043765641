"""Paged KV blocks with reference counts and prefix caching.

A block holds the keys and values of ``block_size`` tokens in every layer (paging after Kwon et al.,
"Efficient Memory Management for LLM Serving with PagedAttention", 2023). A *full* block can be shared:
its identity is the hash of everything that it depends on (the adapter's content, all earlier tokens and its
own tokens) and of its request's salt. So blocks of different adapters, or of different contents of one
adapter, can never be confused, and a request learns nothing about prompts that were sent with another salt.
Freed blocks keep their contents until they are reused, the least recently freed first.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Sequence
from hashlib import blake2b
from itertools import chain


class BlockManager:
    """Hands out block ids ``0..num_blocks-1``. ``can_allocate`` and ``allocate`` come in pairs."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        prefix_caching: bool = True,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self._refs = [0] * num_blocks
        """Holders of each block, where blocks can be shared: with prefix caching."""
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._empty = list(range(num_blocks))
        """Free blocks without cached contents. They are reused before all others, the last one first."""
        self._cached: OrderedDict[int, None] = OrderedDict()
        """Free blocks whose contents are cached, in the order in which they are reused."""

    @property
    def num_free(self) -> int:
        """Number of blocks that no sequence references; their contents may still be cached."""
        return len(self._empty) + len(self._cached)

    @property
    def free(self) -> set[int]:
        """These blocks, for checks."""
        return {*self._empty, *self._cached}

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
        """Find cached blocks for the longest known prefix, covering at most ``max_tokens`` tokens."""
        found: list[int] = []
        for digest in hashes[: max_tokens // self.block_size]:
            block = self._block_of.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def can_allocate(self, new: int, shared: Sequence[int] = ()) -> bool:
        """Whether ``new`` blocks are free beside the ``shared`` ones from the cache."""
        free = len(self._empty) + len(self._cached)
        if shared:
            free -= sum(self._refs[block] == 0 for block in shared)
        return free >= new

    def allocate(self, new: int, shared: Sequence[int] = ()) -> list[int]:
        """Take a reference on each of ``shared`` and on ``new`` fresh blocks; returns their ids."""
        assert self.can_allocate(new, shared)
        if not self.prefix_caching:
            return self._take_free(new)
        refs = self._refs
        for block in shared:
            if refs[block] == 0:
                del self._cached[block]
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
            block, _ = self._cached.popitem(last=False)
            digest = self._hash_of[block]
            assert digest is not None
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
                    self._cached[block] = None

    def forget(self) -> None:
        """Forget all contents; no block may be referenced."""
        assert self.num_free == self.num_blocks
        self._empty = [*reversed(self._cached), *self._empty]
        self._cached.clear()
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
