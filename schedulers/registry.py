"""Finds policies, their parts, and a fleet's routers by name, and builds them with options.

A scheduler policy is named by text: "fcfs", "vtc:input_weight=1,output_weight=2", "edf+gdsf+lookahead",
"package.module:Class", "my_policy.py:MyPolicy" (a file, relative to the working directory); or by a table
such as ``{"order": "edf", "replace": {"name": "gdsf"}, "max_wait": 2}``. Routers, placement policies and
scaling policies are named likewise. Installed packages add to the built-in names through entry points: the
group ``aioengine.schedulers`` has policies and parts, which differ by their base class, and
``aioengine.routers``, ``aioengine.placements`` and ``aioengine.autoscalers`` have those of a fleet.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, NamedTuple

from aioengine.schedulers.checks import nearest
from aioengine.schedulers.named import (
    Supply,
    build,
    import_class,
    options_text,
    parse_named,
    summary,
    unknown,
)
from aioengine.schedulers.parts.base import Ordering, Preemption, Prefetch, Replacement
from aioengine.schedulers.parts.compose import Composed
from aioengine.schedulers.policy import SchedulerPolicy

if TYPE_CHECKING:
    from aioengine.schedulers.routing.autoscaling import ScalingPolicy
    from aioengine.schedulers.routing.interface import PlacementPolicy, RouterPolicy

ROOT = "aioengine.schedulers"
PARTS = {
    "order": "who goes first",
    "replace": "which idle adapter gives up its slot",
    "prefetch": "what to bring from disk to the CPU",
    "preempt": "whom to take off the batch",
}
"""The kinds of parts, and what each decides."""
DEFAULT_PARTS = {"order": "fcfs", "replace": "lru", "prefetch": "lookahead", "preempt": "none"}


class Kind(NamedTuple):
    """A kind of class that is found by name."""

    base: str
    """"module:Class" below ``ROOT``."""
    group: str
    """The group of entry points."""


KINDS: dict[str, Kind] = {
    "policy": Kind("policy:SchedulerPolicy", ROOT),
    "order": Kind("parts.base:Ordering", ROOT),
    "replace": Kind("parts.base:Replacement", ROOT),
    "prefetch": Kind("parts.base:Prefetch", ROOT),
    "preempt": Kind("parts.base:Preemption", ROOT),
    "router": Kind("routing.interface:RouterPolicy", "aioengine.routers"),
    "placement": Kind("routing.interface:PlacementPolicy", "aioengine.placements"),
    "autoscaler": Kind("routing.autoscaling:ScalingPolicy", "aioengine.autoscalers"),
}
BUILT_IN: dict[tuple[str, str], str] = {
    ("policy", "fcfs"): "policies.fcfs:FCFS",
    ("policy", "fair"): "policies.fair:Fair",
    ("policy", "admission"): "policies.admission:Admission",
    ("order", "fcfs"): "parts.base:Arrival",
    ("order", "vllm"): "policies.other_engines:VLLMOrder",
    ("order", "slora"): "policies.slora:SLoRA",
    ("order", "vtc"): "policies.vtc:VTC",
    ("order", "drr"): "policies.drr:DRR",
    ("order", "sjf"): "policies.by_key:SJF",
    ("order", "edf"): "policies.by_key:EDF",
    ("order", "priority"): "policies.by_key:Priority",
    ("order", "lpm"): "policies.windowed:LPM",
    ("order", "session"): "policies.windowed:Session",
    ("order", "toppings"): "policies.windowed:Toppings",
    ("order", "drainer"): "policies.other_engines:Drainer",
    ("order", "chameleon"): "policies.chameleon:ChameleonOrder",
    ("replace", "lru"): "parts.replacement:LRU",
    ("replace", "lfu"): "parts.replacement:LFU",
    ("replace", "gdsf"): "parts.replacement:GDSF",
    ("replace", "chameleon"): "policies.chameleon:ChameleonCache",
    ("replace", "belady"): "parts.replacement:Belady",
    ("replace", "oracle"): "parts.replacement:Belady",
    ("replace", "discard"): "parts.replacement:Discard",
    ("prefetch", "lookahead"): "parts.prefetch:Lookahead",
    ("prefetch", "popular"): "parts.prefetch:Popular",
    ("prefetch", "none"): "parts.prefetch:NoPrefetch",
    ("preempt", "none"): "parts.preemption:NoPreemption",
    ("preempt", "priority"): "parts.preemption:PreemptLower",
    ("router", "round_robin"): "routing.routers.simple:RoundRobin",
    ("router", "least_loaded"): "routing.routers.simple:LeastLoaded",
    ("router", "p2c"): "routing.routers.simple:PowerOfTwoChoices",
    ("router", "holder"): "routing.routers.simple:Holder",
    ("router", "tiers"): "routing.routers.simple:Tiers",
    ("router", "hrw"): "routing.routers.simple:Rendezvous",
    ("router", "shuffle"): "routing.routers.simple:ShuffleSharding",
    ("router", "prefix"): "routing.routers.simple:Prefix",
    ("router", "affinity"): "routing.routers.affinity:Affinity",
    ("placement", "none"): "routing.placement:NoPlacement",
    ("placement", "hrw"): "routing.placement:RendezvousPlacement",
    ("placement", "demand"): "routing.placement:DemandPlacement",
    ("autoscaler", "waiting_work"): "routing.autoscaling:WaitingWork",
}
"""Kind and name -> "module:Class" below ``ROOT``."""
_NAMES = frozenset(name for _, name in BUILT_IN)


class PolicyInfo(NamedTuple):
    """Row that ``aioengine policies`` shows of a policy or part."""

    name: str
    kind: str
    """One of ``KINDS``."""
    summary: str
    options: str
    """Options as text, such as "max_wait: float = 1.0"; empty if it takes none."""
    source: str
    starvation_bound: str
    """Of a policy or an ordering; empty for others."""
    worst_case: str
    """Of what is a fleet's; empty for others."""
    where: str
    """"module:Class"."""


def available(kind: str) -> dict[str, PolicyInfo]:
    """Return what there is of a kind, by name. A package whose entry point cannot be imported is left out."""
    names = [name for of_kind, name in BUILT_IN if of_kind == kind]
    found = {name: _classes(name, name, (kind,))[kind] for name in names}
    for point in entry_points(group=KINDS[kind].group):
        try:
            found.setdefault(point.name, import_class(point.name, point.value, _base(kind)))
        except ValueError:
            continue  # broken, or of another kind; naming it raises the error
    return {name: _info(name, kind, cls) for name, cls in found.items()}


def available_policies() -> dict[str, PolicyInfo]:
    """Return all policies by name: whole policies, and every part combined with the other parts' defaults."""
    found: dict[str, PolicyInfo] = {}
    for kind in ("policy", *PARTS):
        found = available(kind) | found
    del found["none"]
    return found


def available_parts(kind: str) -> dict[str, PolicyInfo]:
    """Return the parts of a kind ("order", "replace", "prefetch" or "preempt"), by name."""
    return available(kind)


def available_routers() -> dict[str, PolicyInfo]:
    """Return the routers by name."""
    return available("router")


def available_placements() -> dict[str, PolicyInfo]:
    """Return the placement policies by name."""
    return available("placement")


def available_autoscalers() -> dict[str, PolicyInfo]:
    """Return the scaling policies by name."""
    return available("autoscaler")


def load_policy(spec: str | Mapping[str, Any], *, supply: Supply | None = None) -> SchedulerPolicy:
    """Build the policy that ``spec`` names; see the module's docstring for the forms. ``supply`` has
    factories for constructor parameters that ``spec`` leaves out, such as ``future`` where a trace is
    replayed.

    Raises ValueError if there is none of this name, it cannot be imported, or an option is unknown or
    out of range.
    """
    what = f"policy {spec!r}"
    if isinstance(spec, str):
        named = [parse_named(what, token, _NAMES) for token in spec.split("+")]
    elif "name" in spec:
        named = [(str(spec["name"]), {key: value for key, value in spec.items() if key != "name"})]
    else:
        allowed = (*PARTS, "max_wait", "name")
        for key in spec:
            if key not in allowed:
                raise ValueError(f"policy: unknown key {key!r}{nearest(key, allowed)}; keys are {allowed}")
        return compose(**spec, supply=supply)
    if len(named) == 1 and (policy := _classes(what, named[0][0], ("policy", *PARTS)).get("policy")):
        built: SchedulerPolicy = build(what, policy, named[0][1], supply)
        return built
    parts: dict[str, Any] = {}
    max_wait = {}
    for name, options in named:
        if "max_wait" in options:
            max_wait["max_wait"] = options.pop("max_wait")
        kinds = _classes(what, name, PARTS)
        if not kinds:
            raise ValueError(f"{what}: {unknown(name, available_policies())}")
        kind = next((kind for kind in kinds if kind not in parts), None)
        if kind is None:
            raise ValueError(f"{what}: two parts of the kind {next(iter(kinds))!r}, the second {name!r}")
        parts[kind] = build(what, kinds[kind], options, supply)
    return compose(**parts, **max_wait, supply=supply)


def compose(
    *,
    order: str | Mapping[str, Any] | Ordering | None = None,
    replace: str | Mapping[str, Any] | Replacement | None = None,
    prefetch: str | Mapping[str, Any] | Prefetch | None = None,
    preempt: str | Mapping[str, Any] | Preemption | None = None,
    max_wait: float = 1.0,
    supply: Supply | None = None,
) -> Composed:
    """Compose a policy of parts, each given by name (with options: "gdsf:x=1", or a table with "name"), or as
    an instance. Defaults: order fcfs, replace lru, prefetch lookahead (or those that the order prefers),
    preempt none. Raises ValueError as :func:`load_policy` does.
    """
    given = {"order": order, "replace": replace, "prefetch": prefetch, "preempt": preempt}
    parts: dict[str, Any] = {}
    for kind, value in given.items():
        default = getattr(parts.get("order"), f"default_{kind}", DEFAULT_PARTS[kind])
        parts[kind] = _part(kind, value or default, supply)
    composed: Composed = build("policy", Composed, {**parts, "max_wait": max_wait}, supply)
    return composed


def load_router(spec: str) -> RouterPolicy:
    """Build the router that ``spec`` names. Raises ValueError as :func:`load_policy` does."""
    router: RouterPolicy = _load("router", spec)
    return router


def load_placement(spec: str) -> PlacementPolicy:
    """Build the placement policy that ``spec`` names. Raises ValueError as :func:`load_policy` does."""
    placement: PlacementPolicy = _load("placement", spec)
    return placement


def load_autoscaler(spec: str) -> ScalingPolicy:
    """Build the scaling policy that ``spec`` names. Raises ValueError as :func:`load_policy` does."""
    autoscaler: ScalingPolicy = _load("autoscaler", spec)
    return autoscaler


def _part(kind: str, given: Any, supply: Supply | None) -> Any:
    base = _base(kind)
    if isinstance(given, base):
        return given
    if isinstance(given, str):
        return _load(kind, given, supply=supply)
    if isinstance(given, Mapping) and isinstance(given.get("name"), str):
        return _load(
            kind, given["name"], {key: value for key, value in given.items() if key != "name"}, supply
        )
    raise ValueError(f"{kind}={given!r}: must be a name, a table with a name, or a {base.__name__}")


def _load(kind: str, spec: str, more: Mapping[str, Any] | None = None, supply: Supply | None = None) -> Any:
    """Build what ``spec`` names, with its options and ``more``."""
    what = f"{kind}={spec!r}" if kind in PARTS else f"{kind} {spec!r}"
    name, options = parse_named(what, spec, _NAMES)
    cls = _classes(what, name, (kind,)).get(kind)
    if cls is None:
        raise ValueError(f"{what}: {unknown(name, available(kind))}")
    return build(what, cls, {**options, **(more or {})}, supply)


def _classes(what: str, name: str, kinds: Iterable[str]) -> dict[str, type[Any]]:
    """Return the classes of this name by kind; none if the name is not known."""
    kinds = tuple(kinds)  # all of one group
    built_in = {kind: BUILT_IN[kind, name] for kind in kinds if (kind, name) in BUILT_IN}
    if built_in:
        return {kind: import_class(what, f"{ROOT}.{at}", _base(kind)) for kind, at in built_in.items()}
    bases = {kind: _base(kind) for kind in kinds}
    targets = [name]
    if ":" not in name:
        targets = [point.value for point in entry_points(group=KINDS[kinds[0]].group, name=name)]
    for target in targets[:1]:
        cls = import_class(what, target, *bases.values())
        return {kind: cls for kind, base in bases.items() if issubclass(cls, base)}
    return {}


def _base(kind: str) -> type[Any]:
    return import_class(kind, f"{ROOT}.{KINDS[kind].base}", object)


def _info(name: str, kind: str, cls: type[Any]) -> PolicyInfo:
    text = {field: getattr(cls, field, "") for field in ("source", "starvation_bound", "worst_case")}
    where = f"{cls.__module__}:{cls.__qualname__}"
    return PolicyInfo(
        name=name, kind=kind, summary=summary(cls), options=options_text(cls), where=where, **text
    )
