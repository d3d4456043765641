"""First come, first served, with ageing: the default policy."""

from __future__ import annotations

from heapq import merge
from itertools import islice

from aioengine.schedulers.policy import (
    Decision,
    Location,
    Place,
    SchedulerPolicy,
    SchedulerView,
    SlotState,
    SlotView,
)


class FCFS(SchedulerPolicy):
    """Admit in arrival order whatever can run now; give slots to the adapters that wait longest.

    Requests whose adapter is in no slot are skipped, not waited for. A cold adapter gets a free slot,
    or one that is idle and that nobody waits for. If there is none for ``max_wait`` seconds, the slot
    that will be free soonest (the fewest tokens left to generate) is closed: it finishes what runs in
    it, admits nothing new, and then goes to the adapter that has waited longest.

    Args:
        max_wait: Seconds that a loaded adapter's oldest request waits before a slot is closed for it.
    """

    starvation_bound = (
        "max_wait, plus, for each max_loras older adapters that wait too, one longest generation "
        "and one copy into a slot"
    )

    def __init__(self, max_wait: float = 1.0) -> None:
        if not max_wait >= 0:
            raise ValueError(f"max_wait={max_wait}: must be >= 0 seconds")
        self.max_wait = max_wait

    def schedule(self, view: SchedulerView) -> Decision:
        cold = self._cold_adapters(view)
        place, closed = self._assign_slots(view, cold)
        prefetch = [name for _, name, where in cold if where is Location.DISK]
        open_queues: list[str | None] = []
        for name in view.waiting_adapters:
            if name is None:
                open_queues.append(None)
            elif view.adapters[name].location is Location.SLOT and name not in closed:
                open_queues.append(name)
        in_order = merge(*map(view.waiting_for, open_queues), key=lambda request: request.arrival)
        admit = [request.request_id for request in islice(in_order, view.free_seqs)]
        return Decision(admit=admit, place=place, prefetch=prefetch)

    @staticmethod
    def _cold_adapters(view: SchedulerView) -> list[tuple[float, str, Location]]:
        """(oldest arrival, name, location) of the adapters that somebody waits for and that are in no
        slot, nor on the way to one; the one that has waited longest first."""
        found: list[tuple[float, str, Location]] = []
        for name in view.waiting_adapters:
            if name is not None:
                adapter = view.adapters[name]
                oldest = adapter.oldest_arrival
                if adapter.slot is None and oldest is not None:
                    found.append((oldest, name, adapter.location))
        return sorted(found)

    def _assign_slots(
        self, view: SchedulerView, cold: list[tuple[float, str, Location]]
    ) -> tuple[list[Place], set[str | None]]:
        """Slots for the cold adapters, and the adapters whose slots are closed for their sake."""
        place: list[Place] = []
        closed: set[str | None] = set()
        if not cold:
            return place, closed
        usable = [slot for slot in view.slots if slot.state is SlotState.READY and not slot.pinned]
        unwanted = [s for s in usable if s.running == 0 and _oldest_waiting(view, s) is None]
        unwanted.sort(key=lambda slot: slot.last_used)
        takeable = [slot for slot in view.slots if slot.state is SlotState.FREE] + unwanted
        wanted = [slot for slot in usable if slot not in unwanted]
        tokens_left = self._tokens_left(view)
        wanted.sort(key=lambda slot: (tokens_left.get(slot.adapter, 0), slot.last_used))
        for oldest, name, location in cold:
            if location is Location.CPU and takeable:
                place.append(Place(name, takeable.pop(0).index))
                continue
            if view.now - oldest < self.max_wait:
                break  # and those after it have waited less
            if location is Location.LOADING or (location is Location.DISK and view.cpu_room > 0):
                continue  # it can use no slot yet, and needs nobody's place to be loaded
            victim = next((s for s in wanted if _younger(view, s, oldest)), None)
            if victim is None:
                continue
            wanted.remove(victim)
            closed.add(victim.adapter)
            if victim.running == 0 and location is Location.CPU:
                place.append(Place(name, victim.index))
        return place, closed

    @staticmethod
    def _tokens_left(view: SchedulerView) -> dict[str | None, int]:
        """By adapter: the most tokens that one of its running requests has left to generate."""
        left: dict[str | None, int] = {}
        for request in view.running:
            tokens = request.max_tokens - request.output_tokens
            left[request.adapter] = max(left.get(request.adapter, 0), tokens)
        return left


def _oldest_waiting(view: SchedulerView, slot: SlotView) -> float | None:
    return None if slot.adapter is None else view.adapters[slot.adapter].oldest_arrival


def _younger(view: SchedulerView, slot: SlotView, oldest: float) -> bool:
    """Whether those who wait for the slot's adapter, if any, came after ``oldest``."""
    waiting = _oldest_waiting(view, slot)
    return waiting is None or waiting > oldest
