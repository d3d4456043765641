"""Blocks that are copied to or from a file, and that stay where they are meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from aioengine.core.blocks import BlockManager


@dataclass(eq=False, slots=True)
class Held:
    """The blocks of a prefix."""

    blocks: list[int]
    hashes: Sequence[bytes]
    known: int
    """Number of blocks, from the first on, that have their contents."""


class HeldBlocks:
    """References on blocks that no request has."""

    def __init__(self, blocks: BlockManager) -> None:
        self._blocks = blocks
        self._held: list[Held] = []

    @property
    def tables(self) -> list[list[int]]:
        return [held.blocks for held in self._held]

    def hold(self, hashes: Sequence[bytes]) -> Held | None:
        """Hold a prefix, if the prefix cache has all of it."""
        found = self._found(hashes)
        if len(found) < len(hashes):
            return None
        return self._keep(Held(self._blocks.allocate(0, found), hashes, len(found)))

    def has_room(self, hashes: Sequence[bytes], spare: int) -> bool:
        """Whether blocks are free for what the cache does not have of a prefix, and ``spare`` more, beside
        those with pinned contents."""
        blocks, found = self._blocks, self._found(hashes)
        new = len(hashes) - len(found)
        return blocks.can_allocate(new + spare + blocks.kept_beside(found), found)

    def take(self, hashes: Sequence[bytes], spare: int) -> Held | None:
        """Hold a prefix whose contents are to be written, in free blocks as far as the cache does not have
        it. None if there is no room for it (:meth:`has_room`)."""
        if not self.has_room(hashes, spare):
            return None
        found = self._found(hashes)
        return self._keep(Held(self._blocks.allocate(len(hashes) - len(found), found), hashes, len(found)))

    def _found(self, hashes: Sequence[bytes]) -> list[int]:
        return self._blocks.match(hashes, len(hashes) * self._blocks.block_size)

    def _keep(self, held: Held) -> Held:
        self._held.append(held)
        return held

    def written(self, held: Held) -> None:
        """Enter all of a prefix in the prefix cache, because its contents are there now."""
        if held in self._held:
            for block, digest in zip(held.blocks[held.known :], held.hashes[held.known :], strict=True):
                self._blocks.commit(block, digest)

    def release(self, held: Held) -> None:
        """Give the blocks back; safe to call again."""
        if held in self._held:
            self._held.remove(held)
            self._blocks.release(held.blocks)

    def clear(self) -> None:
        """Give all back, because their contents are lost."""
        for held in list(self._held):
            self.release(held)
