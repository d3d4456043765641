"""Reports of one engine to the doors of its fleet."""

from __future__ import annotations

from aioengine import events
from aioengine.core.core import Core
from aioengine.schedulers.policy import Location
from aioengine.schedulers.routing import ReplicaLimits, Report, Tiers
from aioengine.schedulers.routing.speed import TokenSpeed

MEMORY = 0.1
"""Weight of the newest measurement in the moving averages of loads."""


class ReplicaReporter:
    """An event listener that reports the engine's state at any time. Its cost grows with the number of
    running requests, not with the number of waiting ones."""

    HEARD = (
        events.RequestAdded,
        events.RequestAdmitted,
        events.RequestEnded,
        events.RequestPreempted,
        events.StepsFinished,
        events.AdapterEvent,
        events.EngineRestarted,
    )

    def __init__(self, core: Core) -> None:
        self._core = core
        self._waiting: dict[str, int] = {}
        """Prompt tokens of requests that have not been admitted yet."""
        self._waiting_tokens = 0
        self._load_seconds: float | None = None
        self._slot_seconds: float | None = None
        self._speed = TokenSpeed()
        self._service_seconds: float | None = None
        self._queued: dict[str, float] = {}
        """Seconds that each admitted request had waited."""
        self.version = 0
        """Number of changes of the adapters in slots, in the CPU cache, or on the way there."""
        for request in core.queues:
            self._wait(request.id, request.remaining)

    @property
    def limits(self) -> ReplicaLimits:
        """The limits, which do not change."""
        core = self._core
        return ReplicaLimits(
            slots=len(core.residency.slots.slots),
            cpu_loras=core.cpu.capacity,
            max_running=core.limits.max_num_seqs,
            kv_tokens=core.blocks.num_blocks * core.blocks.block_size,
        )

    def __call__(self, event: events.Event) -> None:
        match event:
            case events.RequestAdded():
                self._wait(event.request_id, event.prompt_tokens)
            case events.RequestAdmitted():
                self._waiting_tokens -= self._waiting.pop(event.request_id, 0)
                self._queued.setdefault(event.request_id, event.queue_seconds)
            case events.RequestEnded():
                self._waiting_tokens -= self._waiting.pop(event.request_id, 0)
                queued = self._queued.pop(event.request_id, None)
                if queued is not None and event.output_tokens:
                    self._service_seconds = _average(self._service_seconds, event.seconds - queued)
            case events.RequestPreempted():
                request = self._core.requests.get(event.request_id)
                if request is not None:
                    self._wait(event.request_id, request.remaining)
            case events.StepsFinished():
                if event.prefill_tokens > event.decode_tokens:
                    for seconds in event.seconds:
                        self._speed.add(seconds, event.prefill_tokens + event.decode_tokens)
            case events.AdapterLoaded():
                self._load_seconds = _average(self._load_seconds, event.seconds)
                self.version += 1
            case events.AdapterPlaced():
                self._slot_seconds = _average(self._slot_seconds, event.seconds)
                self.version += 1
            case events.AdapterEvent() | events.EngineRestarted():
                self.version += 1

    def report(self, now: float, *, received: int, ended: int, tiers: bool = True) -> Report:
        """Report the engine's state.

        Args:
            now: The time on this replica's clock.
            received: Number of the door's requests received over the report's channel.
            ended: Number of those that have ended.
            tiers: Whether to include where the adapters are; False means unchanged since the last report.
        """
        core = self._core
        running = core.running.values()
        remaining = [len(request.tokens) - request.computed for request in running]
        return Report(
            sent_at=now,
            received=received,
            ended=ended,
            waiting=len(core.queues),
            running=len(running),
            waiting_tokens=self._waiting_tokens + sum(tokens for tokens in remaining if tokens > 1),
            running_tokens=sum([request.computed for request in running]),
            free_kv_tokens=core.blocks.num_free * core.blocks.block_size,
            waiting_for=core.queues.by_adapter(),
            load_seconds=self._load_seconds,
            slot_seconds=self._slot_seconds,
            seconds_per_token=self._speed.seconds_per_token,
            service_seconds=self._service_seconds,
            tiers=self._tiers() if tiers else None,
        )

    def _tiers(self) -> Tiers:
        """List where the current version of each adapter is."""
        found: dict[Location, list[str]] = {Location.SLOT: [], Location.CPU: [], Location.LOADING: []}
        nbytes: dict[str, int] = {}
        for entry in self._core.cpu.entries.values():
            if not entry.retired:
                found[entry.location].append(entry.label)
                if entry.nbytes:
                    nbytes[entry.label] = entry.nbytes
        return Tiers(found[Location.SLOT], found[Location.CPU], found[Location.LOADING], nbytes)

    def _wait(self, request_id: str, tokens: int) -> None:
        self._waiting_tokens += tokens - self._waiting.get(request_id, 0)
        self._waiting[request_id] = tokens


def _average(before: float | None, value: float) -> float:
    return value if before is None else before + MEMORY * (value - before)
