"""Power of two choices."""

from __future__ import annotations

from random import Random

from aioengine.schedulers.routing.interface import FleetView, Route, RouteRequest, RouterPolicy
from aioengine.schedulers.routing.routers.common import by_load, candidates


class PowerOfTwoChoices(RouterPolicy):
    """The less loaded of two replicas drawn at random: several doors with old knowledge do not all choose
    the same one."""

    source = "Mitzenmacher, 'The Power of Two Choices in Randomized Load Balancing', IEEE TPDS 2001"
    worst_case = "as least_loaded; the longest queue is about log log n above the mean"

    def __init__(self, seed: int = 0) -> None:
        self._random = Random(seed)

    def route(self, request: RouteRequest, view: FleetView) -> Route:
        found = candidates(request, view)
        two = found if len(found) <= 2 else self._random.sample(found, 2)
        return Route(by_load(two), reason="two choices")
