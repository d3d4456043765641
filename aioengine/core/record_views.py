"""How a policy sees single records of the core: live and read-only."""

from __future__ import annotations

from operator import attrgetter
from typing import Any


class RecordView:
    """Wraps a record, and is built once, with it. Reading an attribute reads the record.

    An attrgetter takes half as long as a function in Python, and a decision reads these very often.
    """

    __slots__ = ("_of",)

    def __init__(self, record: Any) -> None:
        self._of = record


class CoreRequestView(RecordView):
    """The :class:`~aioengine.schedulers.policy.RequestView` of a request."""

    __slots__ = ()

    request_id = property(attrgetter("_of.id"))
    arrival = property(attrgetter("_of.arrival"))
    priority = property(attrgetter("_of.options.priority"))
    deadline = property(attrgetter("_of.deadline"))
    tenant = property(attrgetter("_of.options.tenant"))
    prompt_tokens = property(attrgetter("_of.prompt_len"))
    max_tokens = property(attrgetter("_of.params.max_tokens"))
    computed_tokens = property(attrgetter("_of.computed"))
    output_tokens = property(attrgetter("_of.output_tokens"))
    cached_tokens = property(attrgetter("_of.cached_now"))

    @property
    def adapter(self) -> str | None:
        entry = self._of.adapter
        name: str | None = None if entry is None else entry.name
        return name

    @property
    def expected_tokens(self) -> int:
        expected: int | None = self._of.options.expected_tokens
        return max(self._of.params.max_tokens, 1) if expected is None else expected


class CoreAdapterView(RecordView):
    """The :class:`~aioengine.schedulers.policy.AdapterView` of an adapter's version."""

    __slots__ = ()

    name = property(attrgetter("_of.name"))
    rank = property(attrgetter("_of.rank"))
    bytes = property(attrgetter("_of.nbytes"))
    location = property(attrgetter("_of.location"))
    slot = property(attrgetter("_of.slot"))
    """The slot that holds it, or that it is being copied to."""
    pinned = property(attrgetter("_of.pinned"))
    waiting = property(lambda self: len(self._of.waiting))
    running = property(attrgetter("_of.running"))
    last_used = property(attrgetter("_of.last_used"))
    disk_seconds = property(attrgetter("_of.disk_seconds"))
    slot_seconds = property(attrgetter("_of.slot_seconds"))
    oldest_arrival = property(attrgetter("_of.waiting.oldest"))


class CoreSlotView(RecordView):
    """The :class:`~aioengine.schedulers.policy.SlotView` of a slot."""

    __slots__ = ()

    index = property(attrgetter("_of.index"))
    adapter = property(attrgetter("_of.shown.name"))
    state = property(attrgetter("_of.shown.slot_state"))
    last_used = property(attrgetter("_of.last_used"))
    running = property(attrgetter("_of.shown.running"))
    pinned = property(attrgetter("_of.shown.pinned"))
