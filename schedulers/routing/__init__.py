"""Routing and adapter placement over a fleet: the interface, the built-in policies, and a gateway's state of
the fleet."""

from aioengine.schedulers.policy import Location as Location
from aioengine.schedulers.registry import available_routers as available_routers
from aioengine.schedulers.registry import load_autoscaler as load_autoscaler
from aioengine.schedulers.registry import load_placement as load_placement
from aioengine.schedulers.registry import load_router as load_router
from aioengine.schedulers.routing.autoscaling import Scaling as Scaling
from aioengine.schedulers.routing.autoscaling import WaitingWork as WaitingWork
from aioengine.schedulers.routing.fleet import FleetState as FleetState
from aioengine.schedulers.routing.guard import PlacementGuard as PlacementGuard
from aioengine.schedulers.routing.guard import RouterGuard as RouterGuard
from aioengine.schedulers.routing.interface import API_VERSION as API_VERSION
from aioengine.schedulers.routing.interface import AdapterView as AdapterView
from aioengine.schedulers.routing.interface import FleetView as FleetView
from aioengine.schedulers.routing.interface import Move as Move
from aioengine.schedulers.routing.interface import PlacementPolicy as PlacementPolicy
from aioengine.schedulers.routing.interface import ReplicaView as ReplicaView
from aioengine.schedulers.routing.interface import Route as Route
from aioengine.schedulers.routing.interface import RouteRequest as RouteRequest
from aioengine.schedulers.routing.interface import RouterPolicy as RouterPolicy
from aioengine.schedulers.routing.prefixes import PREFIX_BLOCK as PREFIX_BLOCK
from aioengine.schedulers.routing.prefixes import prefix_hashes as prefix_hashes
from aioengine.schedulers.routing.replica import ReplicaLimits as ReplicaLimits
from aioengine.schedulers.routing.replica import Report as Report
from aioengine.schedulers.routing.replica import Tiers as Tiers

DEFAULT_ROUTER = "affinity"
DEFAULT_PLACEMENT = "none"
