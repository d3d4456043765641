"""The live, read-only views through which a policy sees the core.

Each wraps one of the core's records and is built once, with that record. Reading an attribute reads the
record.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter
from types import MappingProxyType

from aioengine.core.adapters.known import CoreAdapterView
from aioengine.core.adapters.residency import Residency
from aioengine.core.adapters.slots import Slot, SlotTable, may_leave
from aioengine.core.arrival_queue import ArrivalQueue
from aioengine.core.batcher import Batcher
from aioengine.core.queues import RequestQueues
from aioengine.core.state import AdapterEntry, CoreRequestView, Request
from aioengine.schedulers.policy import CostsView, Refusal

_view = attrgetter("view")
_name = attrgetter("name")


class CoreSlotView:
    __slots__ = ("_s",)

    def __init__(self, slot: Slot) -> None:
        self._s = slot

    # An attrgetter takes half as long as a function in Python, and a decision reads these very often.
    index = property(attrgetter("_s.index"))
    adapter = property(attrgetter("_s.name"))
    state = property(attrgetter("_s.state"))
    last_used = property(attrgetter("_s.last_used"))

    @property
    def running(self) -> int:
        entry = self._s.entry
        return 0 if entry is None else entry.running

    @property
    def pinned(self) -> bool:
        return self._s.entry is not None and self._s.entry.pinned


class _Waiting:
    __slots__ = ("_queue",)

    def __init__(self, queue: ArrivalQueue[Request]) -> None:
        self._queue = queue

    def __iter__(self) -> Iterator[CoreRequestView]:
        return map(_view, self._queue)

    def __len__(self) -> int:
        return len(self._queue)


class _WaitingAdapters:
    __slots__ = ("_queues",)

    def __init__(self, queues: RequestQueues) -> None:
        self._queues = queues

    def __iter__(self) -> Iterator[str | None]:
        heads, base = self._queues.heads, self._queues.base.head
        entries = map(heads.__getitem__, heads)
        if base is None:
            return map(_name, entries)
        return (None if entry is None else entry.name for entry in entries)

    def __reversed__(self) -> Iterator[str | None]:
        heads = self._queues.heads
        entries = map(heads.__getitem__, reversed(heads))
        return (None if entry is None else entry.name for entry in entries)

    def __len__(self) -> int:
        return len(self._queues.heads)


class CoreMemoryView:
    """The :class:`~aioengine.schedulers.policy.MemoryView` of a slot table."""

    __slots__ = ("_entries", "_table")

    def __init__(self, table: SlotTable, entries: Mapping[str, AdapterEntry]) -> None:
        self._table = table
        self._entries = entries

    @property
    def elastic(self) -> bool:
        return self._table.elastic

    @property
    def total(self) -> int:
        return self._table.arena.size

    @property
    def free(self) -> int:
        return self._table.arena.free

    @property
    def largest_hole(self) -> int:
        return self._table.arena.largest_hole

    @property
    def evictable(self) -> int:
        idle = [slot.entry for slot in self._table.slots if slot.idle and may_leave(slot, set())]
        return sum(self._table.arena.rounded(entry.slot_nbytes) for entry in idle if entry is not None)

    def bytes_of(self, adapter: str) -> int:
        nbytes = self._entries[adapter].slot_nbytes
        return self._table.arena.rounded(nbytes) if nbytes else 0


class CoreView:
    """The :class:`~aioengine.schedulers.policy.SchedulerView` of a core's parts."""

    __slots__ = (
        "_adapters",
        "_batcher",
        "_costs",
        "_memory",
        "_now",
        "_queues",
        "_refusals",
        "_residency",
        "_slots",
        "_step",
        "_waiting_adapters",
    )

    def __init__(
        self,
        residency: Residency,
        queues: RequestQueues,
        batcher: Batcher,
        costs: CostsView,
        refusals: Sequence[Refusal],
    ) -> None:
        self._refusals = refusals
        self._residency = residency
        self._queues = queues
        self._batcher = batcher
        self._costs = costs
        self._memory = CoreMemoryView(residency.slots, residency.by_policy_name)
        self._slots = tuple(CoreSlotView(slot) for slot in residency.slots.slots)
        self._adapters = MappingProxyType(residency.by_policy_name.views)
        self._waiting_adapters = _WaitingAdapters(queues)
        self._now = 0.0
        self._step = 0

    def advance(self, now: float, step: int) -> None:
        """Set the time; the core calls it before it asks a policy."""
        self._now, self._step = now, step

    @property
    def now(self) -> float:
        return self._now

    @property
    def step(self) -> int:
        return self._step

    @property
    def slots(self) -> Sequence[CoreSlotView]:
        return self._slots

    @property
    def adapters(self) -> Mapping[str, CoreAdapterView]:
        return self._adapters

    @property
    def waiting(self) -> _Waiting:
        return _Waiting(self._queues.all)

    def waiting_for(self, adapter: str | None) -> _Waiting:
        if adapter is None:
            return _Waiting(self._queues.base)
        return _Waiting(self._residency.by_policy_name[adapter].waiting)

    @property
    def waiting_adapters(self) -> _WaitingAdapters:
        return self._waiting_adapters

    @property
    def running(self) -> Sequence[CoreRequestView]:
        return list(map(_view, self._batcher.running.values()))

    @property
    def refused(self) -> Sequence[Refusal]:
        return tuple(self._refusals)

    @property
    def tokens_left(self) -> dict[str | None, int]:
        left: dict[str | None, int] = {}
        for request in self._batcher.running.values():
            name = request.view.adapter
            tokens = request.params.max_tokens + request.prompt_len - len(request.tokens)
            if tokens > left.get(name, -1):
                left[name] = tokens
        return left

    @property
    def free_blocks(self) -> int:
        blocks = self._batcher.blocks
        return blocks.num_free - blocks.kept_beside(())

    @property
    def block_size(self) -> int:
        return self._batcher.blocks.block_size

    @property
    def free_seqs(self) -> int:
        return self._batcher.max_num_seqs - len(self._batcher.running)

    @property
    def free_tokens(self) -> int:
        return self._batcher.max_num_batched_tokens - len(self._batcher.running)

    @property
    def cpu_room(self) -> int:
        return self._residency.cpu.room

    @property
    def cpu_bytes_room(self) -> int | None:
        cpu = self._residency.cpu
        return None if cpu.max_bytes is None else cpu.bytes_room

    @property
    def load_room(self) -> int:
        return self._residency.load_room

    @property
    def costs(self) -> CostsView:
        return self._costs

    @property
    def memory(self) -> CoreMemoryView:
        return self._memory
