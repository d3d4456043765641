"""Your own scheduler policy: the shortest answers first."""

from aioengine.schedulers import Decision, Place, SchedulerPolicy, SchedulerView, SlotView


class ShortestFirst(SchedulerPolicy):
    """Admit by ``max_tokens``; idle slots go to the adapters of the shortest requests."""

    starvation_bound = "none: a long request waits for as long as shorter ones keep coming"

    def schedule(self, view: SchedulerView) -> Decision:
        queue = sorted(view.waiting, key=lambda request: request.max_tokens)
        ready = {slot.adapter for slot in view.slots if slot.state == "READY"} | {None}
        admit = [r for r in queue if r.adapter in ready][: view.free_seqs]
        wanted = dict.fromkeys(r.adapter for r in queue[: view.free_seqs] if r.adapter)
        cold = [name for name in wanted if view.adapters[name].slot is None]
        keep = {r.adapter for r in admit if r.adapter}
        idle = [s.index for s in view.slots if is_idle(s) and s.adapter not in keep]
        place = [Place(name, slot) for name, slot in zip(cold, idle, strict=False)]
        return Decision(admit=[r.request_id for r in admit], place=place)


def is_idle(slot: SlotView) -> bool:
    return slot.state in ("FREE", "READY") and slot.running == 0 and not slot.pinned
