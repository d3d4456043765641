"""The live, read-only view through which a policy sees the core."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import attrgetter
from types import MappingProxyType

from aioengine.core.adapters.residency import Residency
from aioengine.core.batcher import Batcher
from aioengine.core.queues import RequestQueues
from aioengine.core.state import AdapterEntry, ArrivalQueue, CoreRequestView, RecordView
from aioengine.schedulers.policy import CostsView, Refusal

_view = attrgetter("view")
_name = attrgetter("name")


class _Waiting(RecordView):
    __slots__ = ()
    _of: ArrivalQueue

    def __iter__(self) -> Iterator[CoreRequestView]:
        return map(_view, self._of)

    def __len__(self) -> int:
        return len(self._of)


class _WaitingAdapters(RecordView):
    __slots__ = ()
    _of: RequestQueues

    def __iter__(self) -> Iterator[str | None]:
        entries = map(self._of.heads.__getitem__, self._of.heads)
        if self._of.base.head is None:
            return map(_name, entries)
        return (None if entry is None else entry.name for entry in entries)

    def __reversed__(self) -> Iterator[str | None]:
        entries = reversed(self._of.heads.values())
        return (None if entry is None else entry.name for entry in entries)

    def __len__(self) -> int:
        return len(self._of.heads)


class CoreMemoryView(RecordView):
    """The :class:`~aioengine.schedulers.policy.MemoryView` of the slots' memory."""

    __slots__ = ()
    _of: Residency

    elastic = property(attrgetter("_of.slots.elastic"))
    total = property(attrgetter("_of.slots.arena.size"))
    free = property(attrgetter("_of.slots.arena.free"))
    largest_hole = property(attrgetter("_of.slots.arena.largest_hole"))

    @property
    def evictable(self) -> int:
        slots = self._of.slots
        return sum(slots.arena.rounded(slot.entry.slot_nbytes) for slot in slots.victims(()) if slot.entry)

    def bytes_of(self, adapter: str) -> int:
        nbytes = self._of.names.known[adapter].slot_nbytes
        return self._of.slots.arena.rounded(nbytes) if nbytes else 0


class CoreView:
    """The :class:`~aioengine.schedulers.policy.SchedulerView` of a core's parts."""

    def __init__(
        self,
        residency: Residency,
        queues: RequestQueues,
        batcher: Batcher,
        costs: CostsView,
        refusals: Sequence[Refusal],
    ) -> None:
        self._residency, self._queues, self._batcher = residency, queues, batcher
        self._costs, self._refusals = costs, refusals
        self._memory = CoreMemoryView(residency)
        self._slots = tuple(slot.view for slot in residency.slots.slots)
        self._adapters = MappingProxyType(residency.names.views)
        self._waiting_adapters = _WaitingAdapters(queues)
        self.advance(0.0, 0)

    def advance(self, now: float, step: int) -> None:
        """Set the time; the core calls it before it asks a policy."""
        self._now, self._step = now, step

    now = property(attrgetter("_now"))
    step = property(attrgetter("_step"))
    slots = property(attrgetter("_slots"))
    adapters = property(attrgetter("_adapters"))
    costs = property(attrgetter("_costs"))
    memory = property(attrgetter("_memory"))
    waiting_adapters = property(attrgetter("_waiting_adapters"))
    block_size = property(attrgetter("_batcher.blocks.block_size"))
    free_blocks = property(attrgetter("_batcher.blocks.num_free"))
    cpu_room = property(attrgetter("_residency.cpu.room"))
    cpu_bytes_room = property(attrgetter("_residency.cpu.bytes_room"))
    load_room = property(attrgetter("_residency.load_room"))

    @property
    def waiting(self) -> _Waiting:
        return _Waiting(self._queues.all)

    def waiting_for(self, adapter: str | None) -> _Waiting:
        entry = None if adapter is None else self._residency.names.known[adapter]
        return _Waiting(self._queues.queue_of(entry))

    @property
    def running(self) -> Sequence[CoreRequestView]:
        return list(map(_view, self._batcher.running.values()))

    @property
    def refused(self) -> Sequence[Refusal]:
        return tuple(self._refusals)

    @property
    def tokens_left(self) -> dict[str | None, int]:
        left: dict[AdapterEntry | None, int] = {}
        for request in self._batcher.running.values():
            tokens = request.most_tokens - len(request.tokens)
            if tokens > left.get(request.adapter, -1):
                left[request.adapter] = tokens
        return {None if entry is None else entry.name: tokens for entry, tokens in left.items()}

    @property
    def free_seqs(self) -> int:
        return self._batcher.limits.max_num_seqs - len(self._batcher.running)

    @property
    def free_tokens(self) -> int:
        return self._batcher.limits.max_num_batched_tokens - len(self._batcher.running)
