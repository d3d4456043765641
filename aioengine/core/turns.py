"""Turns: which requests decode in a step, where all of them together would take too long.

All requests in a step get their next token when it ends, so the many of one tenant would set the time
between the tokens of all. Where the decodes alone take more than ``max_step_seconds`` leaves them, the
requests of the tenants with the most take turns therefore, and tenants with few decode in each step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from aioengine.core.pacing import Pacer, StepWork
from aioengine.core.state import Request

REMEMBERED = 64
"""Number of too long steps for which a tenant counts after its last request has ended: who asks for one
answer after the other has none running in between, and its next one waits for the step under way."""


class Turns:
    """The turns of the requests that decode. A request that is not in a step keeps its blocks."""

    def __init__(self, pacer: Pacer) -> None:
        self._pacer = pacer
        self._long_steps = 0
        """Number of steps whose decodes would have taken too long."""
        self._seen: dict[str | None, int] = {}
        """That number when a tenant was last seen."""

    def choose(self, decodes: list[Request], running: Iterable[Request]) -> list[Request]:
        """Return those of ``decodes`` that are in the next step, in the same order: all of them if they fit
        in its time, or if fewer would help no tenant that has at most half as many as another.

        Each tenant has its longest waiting request in each step, so none stands still. Then each has its
        second one, and so on, while there is time.
        """
        costs, left = self._pacer.decode_costs(decodes), self._pacer.decode_room
        if sum(costs) <= left:
            return decodes
        self._long_steps += 1
        self._seen |= dict.fromkeys((request.options.tenant for request in running), self._long_steps)
        oldest = self._long_steps - REMEMBERED
        self._seen = {tenant: at for tenant, at in self._seen.items() if at > oldest}
        counts: Counter[str | None] = Counter()
        ranked: list[tuple[int, float, int]] = []
        """Each one's rank among its tenant's, since when it has waited, and its place in ``decodes``."""
        for waited, place in sorted((_last(request), place) for place, request in enumerate(decodes)):
            tenant = decodes[place].options.tenant
            ranked.append((counts[tenant], waited, place))
            counts[tenant] += 1
        chosen, shortened = set[int](), set[str | None]()
        for rank, _, place in sorted(ranked):
            left -= costs[place]
            if rank == 0 or (left >= 0 and not shortened):
                chosen.add(place)
            else:
                shortened.add(decodes[place].options.tenant)
        most = max(counts.values())
        if not any(2 * counts[tenant] <= most for tenant in self._seen.keys() - shortened):
            return decodes
        return [request for place, request in enumerate(decodes) if place in chosen]

    def all_fit(self, decodes: StepWork) -> bool:
        """Whether all decodes of a step fit in its time, so that ``choose`` would choose all of them."""
        return self._pacer.decode_seconds(decodes) <= self._pacer.decode_room


def _last(request: Request) -> float:
    """Return since when a request waits for its next token."""
    return request.arrival if request.last_token is None else request.last_token
