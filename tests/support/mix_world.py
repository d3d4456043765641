"""Clients of a core that ask again and again, for mixes too, beside pins and reads that hang."""

from __future__ import annotations

import random
from typing import Any

from aioengine.core.limits import CoreLimits
from aioengine.core.state import Request, Status
from aioengine.schedulers.policies.fcfs import FCFS
from aioengine.schedulers.policy import Location
from aioengine.schedulers.registry import load_policy
from aioengine.testing import LIMITS, Sim


def core_with(*names: str, limits: CoreLimits = LIMITS) -> Sim:
    """A core with these adapters, and the simplest policy."""
    sim = Sim(limits, FCFS())
    for name in names:
        sim.register(name)
    return sim


class World:
    """A core with clients that each have one request at a time."""

    def __init__(self, policy: str, shape: str, rng: random.Random) -> None:
        self.rng = rng
        slots = rng.randint(1, 4)
        limits = LIMITS._replace(
            num_slots=slots,
            cpu_capacity=slots + rng.randint(0, 3),
            num_blocks=40,
            max_num_seqs=rng.randint(1, 6),
        )
        if shape == "bytes":
            limits = limits._replace(slot_memory=256 * rng.randint(5, 16))
        self.sim = sim = Sim(limits, load_policy(policy))
        self.names = "abcdef"
        for adapter in self.names:
            sim.register(adapter)
            sim.sizes[adapter] = rng.choice([200, 500, 900, 1200])
        self.stays_hung = False
        """Whether what hangs does so for ever."""
        self.hung = set(rng.sample(self.names, rng.choice([0, 0, 1])))
        self._since: dict[int, int] = {}
        """Steps at which the reads under way began, by uid."""
        self.pinned = rng.sample(self.names, rng.randint(0, max(0, slots - 1)))
        self.outside: dict[str, int] = {}
        """Steps for which pinned adapters have been in no slot."""
        self.clients: list[dict[str, Any]] = []
        tenants = rng.choice([[None], ["x"], [None, "x", "y"]])
        crowd = rng.choice(["", "", "one mix in all slots", "mixes that hang"])
        if crowd == "mixes that hang":
            self.hung, self.stays_hung = {rng.choice(self.names)}, True
            self.pinned = [name for name in self.pinned if name not in self.hung]
        others = [name for name in self.names if name not in self.hung]
        unpinned = [name for name in self.names if name not in self.pinned]
        for index in range(rng.randint(3, 9) if not crowd else rng.randint(7, 10)):
            kind = rng.choice(["plain", "plain", "any", "scale", "mix", "mix", "one mix"])
            own = rng.sample(self.names, rng.randint(2, 4)) if "mix" in kind else rng.choice(self.names)
            if crowd == "one mix in all slots":
                kind, own = "one mix", unpinned[: max(slots, 2)]
            elif crowd == "mixes that hang" and index < 5:
                kind, own = "hung mix", [*self.hung, others[index]]
            self.clients.append(
                {
                    "kind": kind,
                    "own": own,
                    "pause": rng.choice([0, 0, 3, 20]) if not crowd else 0,
                    "tenant": rng.choice(tenants),
                    "length": rng.choice([1, 4, 10]),
                    "next": 0 if kind == "hung mix" else rng.randint(0, 30),
                    "request": None,
                    "at": 0,
                }
            )
        self.steps = 0
        self.longest = {"plain": 0, "mix": 0, "pin": 0}

    def ask(self, client: dict[str, Any]) -> None:
        kind, own, rng, sim = client["kind"], client["own"], self.rng, self.sim
        if kind == "any":
            wanted = rng.choice([None, *self.names])
        elif kind == "plain":
            wanted = own
        elif kind == "scale":
            wanted = sim.mix(own)
        else:
            own = rng.sample(self.names, rng.randint(2, 4)) if kind == "mix" else own
            wanted = sim.mix(*own)
        client["request"] = sim.add(wanted, max_tokens=client["length"], tenant=client["tenant"])
        client["at"] = self.steps

    def step(self, *, ask: bool = True) -> None:
        sim, core = self.sim, self.sim.core
        self.steps += 1
        if self.steps == 30:  # in the middle of the memory
            for name in self.pinned:
                core.residency.want(core.residency.current[name], sim.now, pin=True)
        if self.steps % 40 == 20 and self.pinned:
            name = self.rng.choice(self.pinned)
            core.residency.want(core.residency.declare(name, f"/adapters/{name}"), sim.now)
        for name in self.pinned:
            entry = core.residency.current[name]
            waits = entry.pinned and entry.location is not Location.SLOT and entry.error is None
            self.outside[name] = self.outside.get(name, 0) + 1 if waits else 0
            self.longest["pin"] = max(self.longest["pin"], self.outside[name])
        for client in self.clients:
            request = client["request"]
            if request is None:
                if ask and self.steps >= client["next"]:
                    self.ask(client)
                continue
            waited = self.steps - client["at"]
            if request.admitted is None and request.status is not Status.ENDED:
                kind = "mix" if "mix" in client["kind"] else "plain"
                if not self.hangs(request):
                    self.longest[kind] = max(self.longest[kind], waited)
            elif request.status is Status.ENDED:
                failed = sim.ended[request.id] == "error"
                client["request"], client["next"] = None, self.steps + (20 if failed else client["pause"])
        self.read()
        while sim.copies:
            sim.finish_copy()
        sim.schedule()
        core.check()
        sim.now += 0.2
        if sim.batch is not None:
            sim.finish_step()
            core.check()

    def hangs(self, request: Request) -> bool:
        """Whether it needs what hangs for ever."""
        members = () if request.adapter is None else request.adapter.members
        return self.stays_hung and any(member.label in self.hung for member in members)

    def read(self) -> None:
        """End the reads, except those that hang. These stall after five steps, and most fail after 25."""
        sim = self.sim
        for entry in list(sim.loads):
            since = self._since.setdefault(entry.uid, self.steps)
            if entry.label in self.hung:
                if self.steps - since == 5:
                    sim.core.adapter_load_stalled(entry)
                if self.stays_hung or self.steps - since < 25:
                    continue
            del self._since[entry.uid]
            sim.finish_load(sim.loads.index(entry), fail=entry.label in self.hung)
            sim.core.check()

    def finish(self) -> None:
        for _ in range(400):
            if all(self.hangs(request) for request in self.sim.core.requests.values()):
                break
            self.step(ask=False)
        assert not self.sim.core.requests or self.hung
        assert all(entry.running == 0 for entry in self.sim.core.residency.entries.values())
