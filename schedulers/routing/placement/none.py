"""NoPlacement: adapters are loaded only when requests need them."""

from __future__ import annotations

from collections.abc import Sequence

from aioengine.schedulers.routing.interface import FleetView, Move, PlacementPolicy


class NoPlacement(PlacementPolicy):
    """Moves nothing: adapters go where requests for them are routed, and leave by each replica's cache."""

    source = "what a fleet does without a placement policy"
    worst_case = "the first request after a router has chosen a new replica waits for the load"

    def plan(self, view: FleetView) -> Sequence[Move]:
        return ()
