"""The conversations of a trace that says which prompts begin alike."""

from __future__ import annotations

from aioengine.lab.workload.requests import PREFIX_BLOCK
from aioengine.lab.workload.traces import TraceRow

BRANCHES = 8
"""Continuations of one prompt, beyond which the prompt is a beginning that several conversations share."""
Conversation = tuple[int, int]
"""The place where a conversation parts from others, and its first block of its own."""


class Conversations:
    """Tells the conversations of a trace apart by the tree of the blocks with which its prompts begin.

    Where prompts part, those who have the block before have a beginning in common: a system prompt, or a
    document. The block after it tells their conversations apart. But a block with which a prompt has ended is
    a turn: what follows it is the same conversation, also in up to :data:`BRANCHES` branches (of an agent, or
    answers that were asked for again).
    """

    def __init__(self) -> None:
        self._places: dict[tuple[int, int], int] = {}
        """Place in the tree by the one before it, and the block."""
        self._parts: list[int] = [BRANCHES + 1]
        """Number of places that follow each place; no prompt is a beginning that all of them share."""
        self._turns = {0}
        """Places where a prompt has ended."""

    def add(self, row: TraceRow) -> None:
        """Note a request of the trace. The last block of a prompt that is not a whole one has ids of its own,
        although the prompt may go on in it."""
        place = 0
        for block in row.prefix[: row.prompt_tokens // PREFIX_BLOCK]:
            after = self._places.get((place, block))
            if after is None:
                after = self._places[place, block] = len(self._parts)
                self._parts.append(0)
                self._parts[place] += 1
            place = after
        self._turns.add(place)

    def of(self, prefix: tuple[int, ...]) -> Conversation:
        """Return the conversation of a prompt with these blocks, when all requests have been noted."""
        place, found = 0, (0, prefix[0])
        for block in prefix:
            if self._parts[place] > (BRANCHES if place in self._turns else 1):
                found = place, block
            after = self._places.get((place, block))
            if after is None:
                break
            place = after
        return found
