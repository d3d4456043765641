"""The live, read-only windows through which a policy sees the core.

Each wraps one of the core's records and is built once, with it; reading an attribute reads the record.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from aioengine.core.queues import ArrivalQueue, RequestQueues
from aioengine.core.slots import Slot
from aioengine.core.state import AdapterEntry, Request
from aioengine.schedulers.policy import Location, SlotState

if TYPE_CHECKING:
    from aioengine.core.core import Core


class CoreRequestView:
    __slots__ = ("_r",)

    def __init__(self, request: Request) -> None:
        self._r = request

    request_id = property(lambda self: self._r.id)
    arrival = property(lambda self: self._r.arrival)
    priority = property(lambda self: self._r.options.priority)
    deadline = property(lambda self: self._r.deadline)
    tenant = property(lambda self: self._r.options.tenant)
    prompt_tokens = property(lambda self: self._r.prompt_len)
    max_tokens = property(lambda self: self._r.params.max_tokens)
    output_tokens = property(lambda self: self._r.output_tokens)
    computed_tokens = property(lambda self: self._r.computed)

    @property
    def adapter(self) -> str | None:
        entry: AdapterEntry | None = self._r.adapter
        return None if entry is None else entry.name

    @property
    def expected_tokens(self) -> int:
        expected = self._r.options.expected_tokens
        return max(self._r.params.max_tokens, 1) if expected is None else expected


class CoreSlotView:
    __slots__ = ("_s",)

    def __init__(self, slot: Slot) -> None:
        self._s = slot

    @property
    def index(self) -> int:
        return self._s.index

    @property
    def adapter(self) -> str | None:
        return None if self._s.entry is None else self._s.entry.name

    @property
    def state(self) -> SlotState:
        return self._s.state

    @property
    def running(self) -> int:
        return 0 if self._s.entry is None else self._s.entry.running

    @property
    def last_used(self) -> float:
        return self._s.last_used

    @property
    def pinned(self) -> bool:
        return self._s.entry is not None and self._s.entry.pinned


class CoreAdapterView:
    __slots__ = ("_e",)

    def __init__(self, entry: AdapterEntry) -> None:
        self._e = entry

    name = property(lambda self: self._e.name)
    rank = property(lambda self: self._e.rank)
    bytes = property(lambda self: self._e.nbytes)
    pinned = property(lambda self: self._e.pinned)
    waiting = property(lambda self: len(self._e.waiting))
    running = property(lambda self: self._e.running)
    oldest_arrival = property(lambda self: self._e.oldest_arrival)
    last_used = property(lambda self: self._e.last_used)
    disk_seconds = property(lambda self: self._e.disk_seconds)
    slot_seconds = property(lambda self: self._e.slot_seconds)

    @property
    def location(self) -> Location:
        return self._e.location

    @property
    def slot(self) -> int | None:
        """The slot that holds it, or that it is being copied to."""
        return self._e.slot


class _Waiting:
    __slots__ = ("_queue", "_views")

    def __init__(self, queue: ArrivalQueue, views: Mapping[str, CoreRequestView]) -> None:
        self._queue = queue
        self._views = views

    def __iter__(self) -> Iterator[CoreRequestView]:
        views = self._views
        return (views[request.id] for request in self._queue)

    def __len__(self) -> int:
        return len(self._queue)


class _WaitingAdapters:
    __slots__ = ("_queues",)

    def __init__(self, queues: RequestQueues) -> None:
        self._queues = queues

    def __iter__(self) -> Iterator[str | None]:
        entries = self._queues.heads.values()
        return (None if entry is None else entry.name for entry in entries)

    def __len__(self) -> int:
        return len(self._queues.heads)


class _Adapters(Mapping[str, CoreAdapterView]):
    __slots__ = ("_entries",)

    def __init__(self, entries: Mapping[str, AdapterEntry]) -> None:
        self._entries = entries

    def __getitem__(self, name: str) -> CoreAdapterView:
        return CoreAdapterView(self._entries[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


class CoreView:
    """The :class:`~aioengine.schedulers.policy.SchedulerView` of a core."""

    __slots__ = ("_adapters", "_core", "_slots", "_waiting", "_waiting_adapters")

    def __init__(self, core: Core) -> None:
        self._core = core
        self._slots = tuple(CoreSlotView(slot) for slot in core.slots.slots)
        self._adapters = _Adapters(core.by_policy_name)
        self._waiting = _Waiting(core.queues.all, core.request_views)
        self._waiting_adapters = _WaitingAdapters(core.queues)

    @property
    def adapters(self) -> Mapping[str, CoreAdapterView]:
        return self._adapters

    @property
    def waiting(self) -> _Waiting:
        return self._waiting

    @property
    def waiting_adapters(self) -> _WaitingAdapters:
        return self._waiting_adapters

    @property
    def now(self) -> float:
        return self._core.now

    @property
    def step(self) -> int:
        return self._core.step

    @property
    def slots(self) -> Sequence[CoreSlotView]:
        return self._slots

    def waiting_for(self, adapter: str | None) -> _Waiting:
        core = self._core
        if adapter is None:
            return _Waiting(core.queues.base, core.request_views)
        return _Waiting(core.by_policy_name[adapter].waiting, core.request_views)

    @property
    def running(self) -> Sequence[CoreRequestView]:
        views = self._core.request_views
        return [views[request.id] for request in self._core.running.values()]

    @property
    def free_blocks(self) -> int:
        return self._core.blocks.num_free

    @property
    def block_size(self) -> int:
        return self._core.blocks.block_size

    @property
    def free_seqs(self) -> int:
        return self._core.limits.max_num_seqs - len(self._core.running)

    @property
    def free_tokens(self) -> int:
        return self._core.limits.max_num_batched_tokens - len(self._core.running)

    @property
    def cpu_room(self) -> int:
        return self._core.cpu.room

    @property
    def cpu_bytes_room(self) -> int | None:
        cpu = self._core.cpu
        return None if cpu.max_bytes is None else cpu.bytes_room

    @property
    def load_room(self) -> int:
        return self._core.residency.load_room
