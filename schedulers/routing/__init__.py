"""Routing and adapter placement over a fleet: the interface, the built-in policies, and a door's state of the
fleet."""

from aioengine.schedulers.policy import Location
from aioengine.schedulers.registry import (
    available_autoscalers,
    available_placements,
    available_routers,
    load_autoscaler,
    load_placement,
    load_router,
)
from aioengine.schedulers.routing.autoscaling import Scaling, ScalingPolicy
from aioengine.schedulers.routing.fleet import FleetState
from aioengine.schedulers.routing.guard import PlacementGuard, RouterGuard
from aioengine.schedulers.routing.interface import (
    API_VERSION,
    AdapterView,
    FleetView,
    Move,
    PinnedPrefix,
    PlacementPolicy,
    ReplicaView,
    Route,
    RouteEvent,
    RouteRequest,
    RouterPolicy,
)
from aioengine.schedulers.routing.prefixes import PREFIX_BLOCK, prefix_hashes, prefix_pins
from aioengine.schedulers.routing.replica import ReplicaLimits, Report, Tiers

DEFAULT_ROUTER = "affinity"
DEFAULT_PLACEMENT = "none"

__all__ = [
    "API_VERSION",
    "DEFAULT_PLACEMENT",
    "DEFAULT_ROUTER",
    "PREFIX_BLOCK",
    "AdapterView",
    "FleetState",
    "FleetView",
    "Location",
    "Move",
    "PinnedPrefix",
    "PlacementGuard",
    "PlacementPolicy",
    "ReplicaLimits",
    "ReplicaView",
    "Report",
    "Route",
    "RouteEvent",
    "RouteRequest",
    "RouterGuard",
    "RouterPolicy",
    "Scaling",
    "ScalingPolicy",
    "Tiers",
    "available_autoscalers",
    "available_placements",
    "available_routers",
    "load_autoscaler",
    "load_placement",
    "load_router",
    "prefix_hashes",
    "prefix_pins",
]
