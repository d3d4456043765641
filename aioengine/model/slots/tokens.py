"""Trained tokens: rows of the embeddings, and of the head, that an adapter replaces by its own.

PEFT trains them by ``trainable_token_indices`` (for example for new special tokens), or as a part of whole
embeddings in ``modules_to_save``. The rows lie behind everything else of the adapter in its slot.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from aioengine.kernels import Backend, LoRABatch, LoRAPool
from aioengine.kernels.plan.lora import Segment
from aioengine.kernels.slots import Column, SlotMemory


class TokenTable(NamedTuple):
    """Tokens of one matrix, in ascending order; the row of ``ids[i]`` is ``first + i``."""

    ids: tuple[int, ...] = ()
    first: int = 0


class TokenTables(NamedTuple):
    """The tokens that an adapter replaces. Where the head is tied to the embeddings, both have the same
    rows."""

    embedding: TokenTable
    head: TokenTable
    num_rows: int


class TrainedTokens(NamedTuple):
    """Trained tokens of an adapter that has been read."""

    tables: TokenTables
    rows: Tensor
    """[num_rows, hidden]"""


def ids_of(tables: TokenTables, columns: slice) -> list[Tensor]:
    """Return the tokens whose embeddings are replaced, and those whose logits are, of the tokens ``columns``,
    from the first of these on."""
    headed = tables.head.ids
    low, high = (bisect_left(headed, end) for end in (columns.start, columns.stop))
    own = torch.tensor(headed[low:high], dtype=torch.long) - columns.start
    return [torch.tensor(tables.embedding.ids, dtype=torch.long), own]


class SlotTokens:
    """The trained tokens of a slot's adapter.

    Args:
        ids: What :func:`ids_of` returns for ``tables`` and ``columns``, on the memory's device.
        memory: The memory of all slots.
        hidden: Size of a row.
        columns: The tokens whose logits this rank computes.
        begin: Where the rows begin in the memory, in its elements.
    """

    def __init__(
        self,
        tables: TokenTables,
        ids: Sequence[Tensor],
        memory: SlotMemory,
        hidden: int,
        columns: slice,
        begin: int,
    ) -> None:
        floats = memory.floats(memory.dtype)
        begin //= memory.dtype.itemsize if memory.int8 else 1

        def rows(first: int, count: int) -> Tensor:
            """Return rows [count, hidden], a view."""
            return floats[begin + first * hidden :][: count * hidden].view(count, hidden)

        self._ids, self._columns = ids
        self._embeddings = rows(tables.embedding.first, len(self._ids))
        own = bisect_left(tables.head.ids, columns.start)
        self._head = rows(tables.head.first + own, len(self._columns))

    @property
    def embeds(self) -> bool:
        """Whether embeddings are replaced."""
        return len(self._ids) > 0

    @property
    def has_logits(self) -> bool:
        """Whether logits of this rank are replaced."""
        return len(self._columns) > 0

    def embed(self, token_ids: Tensor, hidden: Tensor) -> None:
        """Replace the embeddings ``hidden`` [n, hidden] of the trained ones among ``token_ids`` [n]."""
        at = torch.searchsorted(self._ids, token_ids).clamp_(max=len(self._ids) - 1)
        trained = (self._ids[at] == token_ids)[:, None]
        hidden.copy_(torch.where(trained, self._embeddings[at].to(hidden.dtype), hidden))

    def logits(self, x: Tensor, logits: Tensor, kernels: Backend) -> None:
        """Replace the trained tokens' columns of ``logits`` [n, this rank's tokens]; ``x`` [n, hidden] is
        what the head gets."""
        logits.index_copy_(1, self._columns, self._products(x, kernels).to(logits.dtype))

    def _products(self, x: Tensor, kernels: Backend) -> Tensor:
        """Return the products of ``x`` [n, hidden] and the head's rows: [n, rows]. As an adapter's A, where
        that makes them independent of n."""
        if kernels.name != "cpu":
            return linear(x, self._head.to(x.dtype))
        count, hidden = self._head.shape
        memory = SlotMemory(self._head.view(-1), 1, 1, count)
        memory.table[0, 0, Column.A_RANK] = count
        pool = LoRAPool(memory, ("lm_head",), 0, hidden, (0,), (0,), (0,), (0,))
        batch = LoRABatch.of([Segment(0, 0, len(x), count)], (), len(x), x.device)
        return kernels.lora_shrink(x, pool, batch)[:, 0, :count]
