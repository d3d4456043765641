"""Speed of a replica, as its gateway and its scaling policy are told."""

from __future__ import annotations

from aioengine import events
from aioengine.info import EngineStats
from aioengine.schedulers.routing.replica import GUESSED_SECONDS_PER_TOKEN, TokenSpeed

_SMOOTHING = 0.2


class Speeds:
    """Moving averages of the seconds that loads, copies, prompt tokens and requests take. It is a
    listener of the engine's events."""

    HEARD = (
        events.AdapterLoaded,
        events.AdapterPlaced,
        events.RequestAdmitted,
        events.RequestEnded,
        events.StepFinished,
    )

    def __init__(self) -> None:
        self.service: float | None = None
        """Seconds from a request's admission to its end."""
        self._queued: dict[str, float] = {}
        """Seconds that each admitted request had waited."""
        self.load: float | None = None
        self.slot: float | None = None
        self.token = TokenSpeed()

    def __call__(self, event: events.Event) -> None:
        match event:
            case events.AdapterLoaded():
                self.load = _smooth(self.load, event.seconds)
            case events.AdapterPlaced():
                self.slot = _smooth(self.slot, event.seconds)
            case events.RequestAdmitted():
                self._queued.setdefault(event.request_id, event.queue_seconds)
            case events.RequestEnded():
                queued = self._queued.pop(event.request_id, None)
                if queued is not None and event.output_tokens:
                    self.service = _smooth(self.service, event.seconds - queued)
            case events.StepFinished() if event.prefill_tokens > event.decode_tokens:
                self.token.add(event.seconds / event.steps, event.prefill_tokens + event.decode_tokens)

    def demand(self, stats: EngineStats) -> dict[str, float]:
        """Return what the scaling policy reads of a replica."""
        seconds_per_token = self.token.seconds_per_token or GUESSED_SECONDS_PER_TOKEN
        slots = {slot.adapter for slot in stats.slots}
        return {
            "waiting": stats.waiting,
            "running": stats.running,
            "max_running": stats.max_running,
            "queue_seconds": (stats.uncomputed_tokens + stats.running) * seconds_per_token,
            "adapters_waiting": len(stats.waiting_for.keys() - slots - {""}),
            "load_seconds": self.load or 0.0,
            "slot_seconds": self.slot or 0.0,
            "service_seconds": self.service or 0.0,
        }


def _smooth(before: float | None, value: float) -> float:
    return value if before is None else before + _SMOOTHING * (value - before)
