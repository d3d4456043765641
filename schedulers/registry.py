"""Finds policies, their parts, and a fleet's routers by name, and builds them with options.

A scheduler policy is named by text: "fcfs", "vtc:input_weight=1,output_weight=2", "edf+gdsf+lookahead",
"package.module:Class", "my_policy.py:MyPolicy" (a file, relative to the working directory); or by a table
such as ``{"order": "edf", "replace": {"name": "gdsf"}, "max_wait": 2}``. Routers, placement policies and
scaling policies are named likewise. Installed packages add to the built-in names through entry points: the
group ``aioengine.schedulers`` has policies and parts, which differ by their base class, and
``aioengine.routers``, ``aioengine.placements`` and ``aioengine.autoscalers`` have those of a fleet.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from aioengine.schedulers.checks import nearest
from aioengine.schedulers.named import Supply, build, import_class, parse_named
from aioengine.schedulers.parts.base import Ordering, Preemption, Prefetch, Replacement
from aioengine.schedulers.parts.compose import Composed
from aioengine.schedulers.policy import SchedulerPolicy

if TYPE_CHECKING:
    from aioengine.schedulers.routing.autoscaling import WaitingWork
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
KINDS = {
    "policy": (ROOT, "policy:SchedulerPolicy"),
    "order": (ROOT, "parts.base:Ordering"),
    "replace": (ROOT, "parts.base:Replacement"),
    "prefetch": (ROOT, "parts.base:Prefetch"),
    "preempt": (ROOT, "parts.base:Preemption"),
    "router": ("aioengine.routers", "routing.interface:RouterPolicy"),
    "placement": ("aioengine.placements", "routing.interface:PlacementPolicy"),
    "autoscaler": ("aioengine.autoscalers", "routing.autoscaling:WaitingWork"),
}
"""Kind -> the group of entry points, and the base class below ``ROOT``."""
BUILT_IN: dict[tuple[str, str], str] = {
    ("policy", "fcfs"): "policies.fcfs:FCFS",
    ("policy", "fair"): "policies.fair:Fair",
    ("order", "fcfs"): "parts.base:Arrival",
    ("order", "vllm"): "policies.by_arrival:VLLMOrder",
    ("order", "slora"): "policies.by_arrival:SLoRA",
    ("order", "vtc"): "policies.vtc:VTC",
    ("order", "drr"): "policies.drr:DRR",
    ("order", "sjf"): "policies.by_key:SJF",
    ("order", "edf"): "policies.by_key:EDF",
    ("order", "priority"): "policies.by_key:Priority",
    ("order", "lpm"): "policies.by_arrival:LPM",
    ("order", "chameleon"): "policies.chameleon:ChameleonOrder",
    ("replace", "lru"): "parts.replacement:LRU",
    ("replace", "lfu"): "parts.replacement:LFU",
    ("replace", "gdsf"): "parts.replacement:GDSF",
    ("replace", "chameleon"): "policies.chameleon:ChameleonCache",
    ("replace", "oracle"): "parts.replacement:Belady",
    ("replace", "discard"): "parts.replacement:Discard",
    ("prefetch", "lookahead"): "parts.base:Lookahead",
    ("prefetch", "none"): "parts.base:NoPrefetch",
    ("preempt", "none"): "parts.base:NoPreemption",
    ("preempt", "priority"): "policies.by_key:PreemptLower",
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
REMOVED = {
    "joint": "it weighed adapters against cached prefixes in one memory. Take 'fcfs'",
    "dlora": "it merged adapters with the base model's weights. Take 'fcfs'",
    "session": "it was nearly 'lpm'. Take 'lpm'",
    "drainer": "it drained slots as SGLang does. Take 'fcfs:max_wait=3'",
    "admission": "it rejected requests that would be late. Take 'edf', which serves more",
    "toppings": "its order by ranks helped in no experiment. Take 'fcfs'",
    "popular": "it read adapters for which no request waited. Take 'lookahead'",
    "belady": "it is called as in the lab's reports. Take 'oracle'",
}
"""Policies and parts that earlier versions had: why they went, and what to do instead."""


class PolicyInfo(NamedTuple):
    """Row that ``aioengine policies`` shows of a policy or part."""

    name: str
    kind: str
    """One of ``KINDS``."""
    summary: str
    options: str
    """Such as "max_wait: float = 1.0"; empty if it takes none."""
    source: str
    starvation_bound: str
    """Of a policy or an ordering; empty for others."""
    worst_case: str
    """Of what is a fleet's; empty for others."""
    where: str
    """As in "module:Class"."""


def available(kind: str) -> dict[str, PolicyInfo]:
    """Return what there is of a kind, by name. A package whose entry point cannot be imported is left out."""
    names = [name for of_kind, name in BUILT_IN if of_kind == kind]
    found = {name: _classes(name, name, (kind,))[kind] for name in names}
    group, _ = KINDS[kind]
    for point in entry_points(group=group):
        try:
            found.setdefault(point.name, _of_kinds(point.name, point.value, (kind,))[kind])
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


def available_routers() -> dict[str, PolicyInfo]:
    """Return the routers by name."""
    return available("router")


def load_policy(spec: str | Mapping[str, Any], *, supply: Supply | None = None) -> SchedulerPolicy:
    """Build the policy that ``spec`` names; see the module's docstring for the forms. ``supply`` has
    factories for constructor parameters that ``spec`` leaves out, such as ``future`` where a trace is
    replayed.

    Raises ValueError if there is none of this name, it cannot be imported, or an option is unknown or
    out of range.
    """
    what = f"policy {spec!r}"
    if not isinstance(spec, str) and "name" not in spec:
        allowed = (*PARTS, "max_wait", "name")
        for key in spec:
            if key not in allowed:
                raise ValueError(f"policy: unknown key {key!r}{nearest(key, allowed)}; keys are {allowed}")
        return compose(**spec, supply=supply)
    named = [_named(what, token) for token in (spec.split("+") if isinstance(spec, str) else (spec,))]
    if len(named) == 1 and (policy := _classes(what, named[0][0], ("policy", *PARTS)).get("policy")):
        return cast("SchedulerPolicy", build(what, policy, named[0][1], supply))
    parts: dict[str, Any] = {}
    max_wait = {}
    for name, options in named:
        if "max_wait" in options:
            max_wait["max_wait"] = options.pop("max_wait")
        kinds = _classes(what, name, PARTS) or _unknown(what, name, available_policies())
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
    """Compose a policy of parts, each given by name (with options: "sjf:input_weight=2", or a table with
    "name"), or as an instance. Defaults: order fcfs, replace lru, prefetch lookahead (or those that the order
    prefers), preempt none. Raises ValueError as :func:`load_policy` does.
    """
    given = {"order": order, "replace": replace, "prefetch": prefetch, "preempt": preempt}
    parts: dict[str, Any] = {}
    for kind, value in given.items():
        value = value or getattr(parts.get("order"), f"default_{kind}", DEFAULT_PARTS[kind])
        parts[kind] = value if isinstance(value, _base(kind)) else _load(kind, value, supply)
    return cast("Composed", build("policy", Composed, {**parts, "max_wait": max_wait}, supply))


def load_router(spec: str) -> RouterPolicy:
    """Build the router that ``spec`` names. Raises ValueError as :func:`load_policy` does."""
    return cast("RouterPolicy", _load("router", spec))


def load_placement(spec: str) -> PlacementPolicy:
    """Build the placement policy that ``spec`` names. Raises ValueError as :func:`load_policy` does."""
    return cast("PlacementPolicy", _load("placement", spec))


def load_autoscaler(spec: str) -> WaitingWork:
    """Build the scaling policy that ``spec`` names. Raises ValueError as :func:`load_policy` does."""
    return cast("WaitingWork", _load("autoscaler", spec))


def removed(spec: object) -> str:
    """Return what to do instead of a policy or part that was removed, if a text or a table names one."""
    if isinstance(spec, Mapping):
        return next(filter(None, map(removed, spec.values())), "")
    names = [token.partition(":")[0].strip() for token in spec.split("+")] if isinstance(spec, str) else []
    return next((f"policy={name!r} was removed: {REMOVED[name]}" for name in names if name in REMOVED), "")


def _load(kind: str, spec: Any, supply: Supply | None = None) -> Any:
    """Build what a text or a table names."""
    what = f"{kind}={spec!r}" if kind in PARTS else f"{kind} {spec!r}"
    name, options = _named(what, spec)
    classes = _classes(what, name, (kind,)) or _unknown(what, name, available(kind))
    return build(what, classes[kind], options, supply)


def _named(what: str, spec: Any) -> tuple[str, dict[str, Any]]:
    """Return the name, and the options, of a text or a table."""
    if isinstance(spec, Mapping) and isinstance(spec.get("name"), str):
        name, options = _named(what, spec["name"])
        return name, {**options, **{key: value for key, value in spec.items() if key != "name"}}
    if isinstance(spec, str):
        return parse_named(what, spec, _NAMES)
    raise ValueError(f"{what}: must be a name, a table with a name, or an instance")


def _unknown(what: str, name: str, known: Collection[str]) -> dict[str, type[Any]]:
    raise ValueError(
        f"{what}: there is no {name!r}{nearest(name, known)}; known are {', '.join(sorted(known))}, or give "
        "'package.module:Class' or 'file.py:Class'"
    )


def _classes(what: str, name: str, kinds: Collection[str]) -> dict[str, type[Any]]:
    """Return the classes of this name by kind; none if the name is not known."""
    built_in = [kind for kind in kinds if (kind, name) in BUILT_IN]
    if built_in:
        return {kind: _of_kinds(what, f"{ROOT}.{BUILT_IN[kind, name]}", (kind,))[kind] for kind in built_in}
    group, _ = KINDS[next(iter(kinds))]  # all are of one group
    targets = [name] if ":" in name else [point.value for point in entry_points(group=group, name=name)]
    if not targets and group == ROOT and (gone := removed(name)):
        raise ValueError(f"{what}: {gone}")
    return _of_kinds(what, targets[0], kinds) if targets else {}


def _of_kinds(what: str, target: str, kinds: Collection[str]) -> dict[str, type[Any]]:
    """Import a class, and return it by the kinds that it is of. Raises ValueError if it is of none."""
    cls = import_class(what, target)
    found = {kind: cls for kind in kinds if issubclass(cls, _base(kind))}
    if found:
        return found
    bases = " or ".join(_base(kind).__name__ for kind in kinds)
    hints = [
        f"; it is {'an' if kind == 'order' else 'a'} {_base(kind).__name__}: register it as {kind!r}"
        for kind in KINDS
        if issubclass(cls, _base(kind))
    ]
    raise ValueError(f"{what}: {target} is not a subclass of {bases}{''.join(hints)}")


def _base(kind: str) -> type[Any]:
    return import_class(kind, f"{ROOT}.{KINDS[kind][1]}")


def _info(name: str, kind: str, cls: type[Any]) -> PolicyInfo:
    text = {field: getattr(cls, field, "") for field in ("source", "starvation_bound", "worst_case")}
    summary = (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " ")
    signature = inspect.signature(cls).replace(return_annotation=inspect.Signature.empty)
    options = str(signature)[1:-1].replace("'", "")
    where = f"{cls.__module__}:{cls.__qualname__}"
    return PolicyInfo(name=name, kind=kind, summary=summary, options=options, where=where, **text)
