"""Adapters and cached prefixes in one memory: the content that costs least to bring back leaves first."""

from __future__ import annotations

from aioengine.schedulers.parts.base import Replacement
from aioengine.schedulers.parts.compose import Composed
from aioengine.schedulers.parts.lfu import DecayedCounts
from aioengine.schedulers.parts.lookahead import Lookahead
from aioengine.schedulers.parts.none import NoPreemption
from aioengine.schedulers.policies.fcfs import Arrival
from aioengine.schedulers.policy import (
    AdapterView,
    Decision,
    PolicyEvent,
    SchedulerView,
    SlotState,
    SlotView,
)

SAMPLE_BLOCKS = 32
"""Number of blocks whose cost is requested, because the cost of one block would be mostly a step's fixed
time."""


class ReloadWorth(Replacement):
    """Keeps the adapters with the highest reload cost for each byte.

    value = uses x seconds of a copy into a slot / bytes in a slot. As long as no copy has been timed, every
    one counts as a second.

    Args:
        half_life: Seconds after which a use counts half; 0: it counts in full for ever.
    """

    source = "Zhang et al. 2025, FASTLIBRA, arXiv:2505.03756 (a unified cost model)"

    def __init__(self, half_life: float = 300.0) -> None:
        self.counts = DecayedCounts(half_life)

    def on_event(self, event: PolicyEvent) -> None:
        if event.kind == "request_admitted" and event.adapter is not None:
            self.counts.add(event.adapter, event.now)

    def worth(self, view: SchedulerView, name: str) -> float:
        """Return the seconds for each byte that would be lost if the adapter left its slot."""
        seconds = view.memory.reload_seconds(name)
        nbytes = max(view.memory.bytes_of(name), 1)
        return self.counts.count(name, view.now) * (1.0 if seconds is None else seconds) / nbytes

    def score(self, view: SchedulerView, slot: SlotView, adapter: AdapterView) -> float:
        return self.worth(view, adapter.name)


class Joint(Composed):
    """First come, first served; the adapter or prefix that costs least to bring back leaves first.

    For adapters and the KV cache in one memory. An idle adapter is worth its uses x the seconds of its reload
    from the CPU, and a cached prefix the blocks that requests found x the seconds to compute one; both for
    each byte. Idle adapters that are worth less than cached prefixes on average leave before any of these
    (``Decision.evict``); the others stay until the prefixes are gone. Where slots have a separate memory, it
    only orders the adapters.

    Differences from the paper: prefixes are weighed as a whole, and the least recently used one leaves first;
    they are computed again, and not kept on the CPU.

    Args:
        half_life: Seconds after which a use counts half; 0: it counts in full for ever.
        max_wait: Seconds that an adapter's oldest request waits before others make way for it.
    """

    source = (
        "Zhang et al. 2025, FASTLIBRA, arXiv:2505.03756 (one cost model); "
        "Sheng et al. 2023, S-LoRA, arXiv:2311.03285 (one memory)"
    )

    def __init__(self, half_life: float = 300.0, max_wait: float = 1.0) -> None:
        self.worth = ReloadWorth(half_life)
        self._found = DecayedCounts(half_life)
        super().__init__(Arrival(), self.worth, Lookahead(), NoPreemption(), max_wait=max_wait)

    def on_event(self, event: PolicyEvent) -> None:
        super().on_event(event)
        if event.kind == "request_admitted" and event.request is not None:
            self._found.add("tokens", event.now, event.request.cached_tokens)

    def schedule(self, view: SchedulerView) -> Decision:
        decision = super().schedule(view)
        memory = view.memory
        if not memory.shared or not memory.cached_blocks or not (len(view.waiting) or view.running):
            return decision
        price = self._prefix_worth(view)
        taken = {*decision.evict, *(place.adapter for place in decision.place)}
        cheap: list[tuple[float, str]] = []
        for slot in view.slots:
            name = slot.adapter
            if name is None or name in taken or slot.running or slot.pinned:
                continue
            if slot.state is not SlotState.READY:
                continue
            if not view.adapters[name].waiting and (worth := self.worth.worth(view, name)) < price:
                cheap.append((worth, name))
        return decision._replace(evict=[*decision.evict, *(name for _, name in sorted(cheap))])

    def _prefix_worth(self, view: SchedulerView) -> float:
        """Return the seconds for each byte that would be lost with an average cached block; 0 while that is
        not known."""
        memory = view.memory
        seconds = memory.prefill_seconds(SAMPLE_BLOCKS)
        if seconds is None:
            return 0.0
        found = self._found.count("tokens", view.now) / view.block_size
        return found / memory.cached_blocks * seconds / SAMPLE_BLOCKS / memory.block_bytes
