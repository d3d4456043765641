"""Your own scheduler policy: the shortest answers first."""

from aioengine.schedulers import Decision, Place, SchedulerPolicy, SchedulerView, SlotView


class ShortestFirst(SchedulerPolicy):
    """Admit by ``max_tokens``; idle slots go to the adapters of the shortest requests."""

    starvation_bound = "none: a long request waits for as long as shorter ones keep coming"

    def schedule(self, view: SchedulerView) -> Decision:
        queue = sorted(view.waiting, key=lambda request: request.max_tokens)
        usable = {s.adapter for s in view.slots if s.state in ("READY", "DRAINING")} | {None}
        admit = [r for r in queue if r.adapter in usable][: view.free_seqs]
        wanted = dict.fromkeys(r.adapter for r in queue if r.adapter)
        cold = [name for name in wanted if view.adapters[name].slot is None]
        if not view.running:  # those on the CPU first: it may have no room for another one
            cold.sort(key=lambda name: view.adapters[name].location != "CPU")
        keep = {r.adapter for r in admit if r.adapter}
        idle = [s.index for s in view.slots if is_idle(s) and s.adapter not in keep]
        place = [Place(name, slot) for name, slot in zip(cold, idle, strict=False)]
        return Decision(admit=[r.request_id for r in admit], place=place)


def is_idle(slot: SlotView) -> bool:
    return slot.state in ("FREE", "READY") and slot.running == 0 and not slot.pinned
