"""Finds routers, placement and scaling policies by name, and builds them with options.

They are named like scheduler policies: "affinity", "affinity:margin=0.5", "package.module:Class",
"my_router.py:MyRouter". Installed packages add to the built-in names through the entry point groups
``aioengine.routers``, ``aioengine.placements`` and ``aioengine.autoscalers``.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any, NamedTuple

from aioengine.schedulers.named import build, import_class, options_text, parse_named, summary, unknown
from aioengine.schedulers.routing.autoscaling import ScalingPolicy
from aioengine.schedulers.routing.interface import PlacementPolicy, RouterPolicy

DEFAULT_ROUTER = "affinity"
DEFAULT_PLACEMENT = "none"

_HERE = "aioengine.schedulers.routing"
_ROUTERS = {
    "round_robin": f"{_HERE}.routers.round_robin:RoundRobin",
    "least_loaded": f"{_HERE}.routers.least_loaded:LeastLoaded",
    "p2c": f"{_HERE}.routers.p2c:PowerOfTwoChoices",
    "holder": f"{_HERE}.routers.holder:Holder",
    "tiers": f"{_HERE}.routers.tiers:Tiers",
    "hrw": f"{_HERE}.routers.hrw:Rendezvous",
    "shuffle": f"{_HERE}.routers.shuffle:ShuffleSharding",
    "prefix": f"{_HERE}.routers.prefix:Prefix",
    "affinity": f"{_HERE}.routers.affinity:Affinity",
}
_PLACEMENTS = {
    "none": f"{_HERE}.placement.none:NoPlacement",
    "hrw": f"{_HERE}.placement.hrw:RendezvousPlacement",
    "demand": f"{_HERE}.placement.demand:DemandPlacement",
}
_AUTOSCALERS = {"waiting_work": f"{_HERE}.autoscaling:WaitingWork"}


class RoutingInfo(NamedTuple):
    """Row that ``aioengine policies`` shows of a router, a placement or a scaling policy."""

    name: str
    summary: str
    options: str
    """Options as text, such as "margin: float = 0.5"; empty if it takes none."""
    source: str
    worst_case: str
    where: str
    """"module:Class"."""


def available_routers() -> dict[str, RoutingInfo]:
    """Return the routers by name. A package whose entry point cannot be imported is left out."""
    return _available("router")


def available_placements() -> dict[str, RoutingInfo]:
    """Return the placement policies by name."""
    return _available("placement")


def available_autoscalers() -> dict[str, RoutingInfo]:
    """Return the scaling policies by name."""
    return _available("autoscaler")


def load_router(spec: str) -> RouterPolicy:
    """Build the router that ``spec`` names; see the module's docstring for the forms.

    Raises ValueError if there is none of this name, it cannot be imported, or an option is unknown or
    out of range.
    """
    found = _load("router", spec)
    assert isinstance(found, RouterPolicy)
    return found


def load_placement(spec: str) -> PlacementPolicy:
    """Build the placement policy that ``spec`` names. Raises ValueError as :func:`load_router` does."""
    found = _load("placement", spec)
    assert isinstance(found, PlacementPolicy)
    return found


def load_autoscaler(spec: str) -> ScalingPolicy:
    """Build the scaling policy that ``spec`` names. Raises ValueError as :func:`load_router` does."""
    found = _load("autoscaler", spec)
    assert isinstance(found, ScalingPolicy)
    return found


class _Kind(NamedTuple):
    base: type[Any]
    built_in: dict[str, str]
    group: str


_KINDS = {
    "router": _Kind(RouterPolicy, _ROUTERS, "aioengine.routers"),
    "placement": _Kind(PlacementPolicy, _PLACEMENTS, "aioengine.placements"),
    "autoscaler": _Kind(ScalingPolicy, _AUTOSCALERS, "aioengine.autoscalers"),
}


def _load(kind: str, spec: str) -> Any:
    what = f"{kind} {spec!r}"
    if not isinstance(spec, str):
        raise ValueError(f"{what}: must be a name, or 'package.module:Class'")
    known = _targets(kind)
    name, options = parse_named(what, spec, known)
    target = known.get(name) or (name if ":" in name else None)
    if target is None:
        raise ValueError(f"{what}: {unknown(name, known)}")
    return build(what, _import(kind, what, target), options, {})


def _available(kind: str) -> dict[str, RoutingInfo]:
    found = {}
    for name, target in _targets(kind).items():
        try:
            cls = _import(kind, name, target)
        except ValueError:
            if name in _KINDS[kind].built_in:
                raise
            continue  # a broken package; naming its policy raises the error
        found[name] = RoutingInfo(name, summary(cls), options_text(cls), cls.source, cls.worst_case, target)
    return found


def _targets(kind: str) -> dict[str, str]:
    known = _KINDS[kind]
    others = {point.name: point.value for point in entry_points(group=known.group)}
    return {**others, **known.built_in}


def _import(kind: str, what: str, target: str) -> type[Any]:
    base = _KINDS[kind].base
    return import_class(what, target, (base,), base.__name__)
