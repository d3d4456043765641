"""Finds policies and parts by name, and builds them with options.

A policy is named by text: "fcfs", "vtc:input_weight=1,output_weight=2", "edf+gdsf+lookahead",
"package.module:Class", "my_policy.py:MyPolicy" (a file, relative to the working directory); or by a table
such as ``{"order": "edf", "replace": {"name": "gdsf"}, "max_wait": 2}``. Installed packages add to the
built-in names through the entry point group ``aioengine.schedulers`` (whole policies and parts, which differ
by their base class).
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any, NamedTuple

from aioengine.schedulers.named import (
    Supply,
    build,
    import_class,
    options_text,
    parse_named,
    summary,
    unknown,
)
from aioengine.schedulers.nearest import nearest
from aioengine.schedulers.parts.base import Ordering, Part, Preemption, Prefetch, Replacement
from aioengine.schedulers.parts.compose import Composed
from aioengine.schedulers.policy import SchedulerPolicy

ENTRY_POINT_GROUP = "aioengine.schedulers"
KINDS: dict[str, type[Part]] = {
    "order": Ordering,
    "replace": Replacement,
    "prefetch": Prefetch,
    "preempt": Preemption,
}
DEFAULT_PARTS = {"order": "fcfs", "replace": "lru", "prefetch": "lookahead", "preempt": "none"}

_POLICY, _PART = "aioengine.schedulers.policies", "aioengine.schedulers.parts"
_POLICIES = {
    "fcfs": f"{_POLICY}.fcfs:FCFS",
    "fair": f"{_POLICY}.fair:Fair",
    "chameleon": f"{_POLICY}.chameleon:Chameleon",
    "oracle": f"{_POLICY}.oracle:Oracle",
    "admission": f"{_POLICY}.admission:Admission",
}
_PARTS: dict[str, dict[str, str]] = {
    "order": {
        "fcfs": f"{_PART}.arrival:Arrival",
        "vllm": f"{_POLICY}.other_engines:VLLMOrder",
        "slora": f"{_POLICY}.slora:SLoRA",
        "vtc": f"{_POLICY}.vtc:VTC",
        "drr": f"{_POLICY}.drr:DRR",
        "sjf": f"{_POLICY}.sjf:SJF",
        "edf": f"{_POLICY}.edf:EDF",
        "priority": f"{_POLICY}.priority:Priority",
        "lpm": f"{_POLICY}.lpm:LPM",
        "session": f"{_POLICY}.lpm:Session",
        "toppings": f"{_POLICY}.toppings:Toppings",
        "drainer": f"{_POLICY}.other_engines:Drainer",
        "chameleon": f"{_POLICY}.chameleon:ChameleonOrder",
    },
    "replace": {
        "lru": f"{_PART}.lru:LRU",
        "lfu": f"{_PART}.lfu:LFU",
        "gdsf": f"{_PART}.gdsf:GDSF",
        "chameleon": f"{_POLICY}.chameleon:ChameleonCache",
        "belady": f"{_POLICY}.oracle:Belady",
        "discard": f"{_PART}.none:Discard",
    },
    "prefetch": {
        "lookahead": f"{_PART}.lookahead:Lookahead",
        "popular": f"{_PART}.popular:Popular",
        "none": f"{_PART}.none:NoPrefetch",
    },
    "preempt": {
        "none": f"{_PART}.none:NoPreemption",
        "priority": f"{_POLICY}.priority:PreemptLower",
    },
}

_BUILT_IN = set(_POLICIES).union(*_PARTS.values())


class PolicyInfo(NamedTuple):
    """Row that ``aioengine policies`` shows of a policy or part."""

    name: str
    kind: str
    """"policy", or a part's kind: "order", "replace", "prefetch", "preempt"."""
    summary: str
    options: str
    """Options as text, such as "max_wait: float = 1.0"; empty if it takes none."""
    source: str
    starvation_bound: str
    where: str
    """"module:Class"."""


def available_policies() -> dict[str, PolicyInfo]:
    """Return all policies by name: whole policies, and every part combined with the other parts' defaults. A
    package whose entry point cannot be imported is left out."""
    found: dict[str, PolicyInfo] = {}
    for name, target in _installed("policy").items():
        found[name] = _info(name, "policy", _import(name, target), target)
    for kind in KINDS:
        for name, info in available_parts(kind).items():
            found.setdefault(name, info)
    del found["none"]
    return found


def available_parts(kind: str) -> dict[str, PolicyInfo]:
    """Return the parts of a kind ("order", "replace", "prefetch" or "preempt"), by name."""
    return {
        name: _info(name, kind, _import(name, target), target) for name, target in _installed(kind).items()
    }


def load_policy(spec: str | Mapping[str, Any], *, supply: Supply | None = None) -> SchedulerPolicy:
    """Build the policy that ``spec`` names; see the module's docstring for the forms. ``supply`` has
    factories for constructor parameters that ``spec`` leaves out, such as ``future`` where a trace is
    replayed.

    Raises ValueError if there is none of this name, it cannot be imported, or an option is unknown or
    out of range.
    """
    supply = supply or {}
    if isinstance(spec, str):
        known = _all_names(spec)
        tokens = [parse_named(f"policy {spec!r}", token, known) for token in spec.split("+")]
        if len(tokens) == 1:
            return _single(spec, *tokens[0], supply)
        return _from_tokens(spec, tokens, supply)
    values = dict(spec)
    name = values.pop("name", None)
    if name is not None:
        return _single(str(name), str(name), values, supply)
    for key in values:
        if key not in (*KINDS, "max_wait"):
            hint = nearest(key, [*KINDS, "max_wait", "name"])
            raise ValueError(f"policy: unknown key {key!r}{hint}; keys are name, or order, replace, ...")
    return compose(**values, supply=supply)


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
    an instance. Defaults: order fcfs, replace lru, prefetch lookahead (or the one that the order prefers),
    preempt none. Raises ValueError as :func:`load_policy` does.
    """
    supply = supply or {}
    ordering = _part("order", order or DEFAULT_PARTS["order"], supply)
    preferred = getattr(ordering, "default_prefetch", DEFAULT_PARTS["prefetch"])
    parts = (
        ordering,
        _part("replace", replace or DEFAULT_PARTS["replace"], supply),
        _part("prefetch", prefetch or preferred, supply),
        _part("preempt", preempt or DEFAULT_PARTS["preempt"], supply),
    )
    return Composed(*parts, max_wait=max_wait)  # type: ignore[arg-type] # _part checks the kinds


# Text


def _single(text: str, name: str, options: dict[str, Any], supply: Supply) -> SchedulerPolicy:
    target = _target("policy", name)
    if target is not None:
        found = _import(text, target)
        if issubclass(found, SchedulerPolicy):
            policy = build(f"policy {text!r}", found, options, supply)
            assert isinstance(policy, SchedulerPolicy)
            return policy
    return _from_tokens(text, [(name, options)], supply)


def _from_tokens(text: str, tokens: list[tuple[str, dict[str, Any]]], supply: Supply) -> SchedulerPolicy:
    parts: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    for name, options in tokens:
        if "max_wait" in options:
            extra["max_wait"] = options.pop("max_wait")
        kind = _kind_of(text, name, taken=parts)
        parts[kind] = {"name": name, **options}
    if "max_wait" in extra:
        try:
            extra["max_wait"] = float(extra["max_wait"])
        except ValueError:
            raise ValueError(f"policy {text!r}: max_wait={extra['max_wait']!r} is no number") from None
    return compose(**parts, **extra, supply=supply)


def _kind_of(text: str, name: str, taken: Mapping[str, Any]) -> str:
    """Return the first kind that has a part of this name and is still free."""
    if ":" in name:
        found = _import(text, name)
        for kind, base in KINDS.items():
            if issubclass(found, base) and kind not in taken:
                return kind
        raise ValueError(f"policy {text!r}: {name} is no part, or one of its kind is given already")
    if name not in _BUILT_IN:
        for point in entry_points(group=ENTRY_POINT_GROUP):
            if point.name == name:
                _import(text, point.value)  # raises if it is broken
    having = [kind for kind in KINDS if _target(kind, name) is not None]
    for kind in having:
        if kind not in taken:
            return kind
    if having:
        raise ValueError(f"policy {text!r}: two parts of the kind {having[0]!r}, the second {name!r}")
    raise ValueError(f"policy {text!r}: {unknown(name, _all_names())}")


def _all_names(spec: str | None = None) -> set[str]:
    """Return all installed names, or only the built-in ones if ``spec`` has no others, because searching
    packages takes time."""
    if spec is not None and all(token.strip().partition(":")[0] in _BUILT_IN for token in spec.split("+")):
        return _BUILT_IN
    return set(_installed("policy")).union(*(_installed(kind) for kind in KINDS))


# Classes


def _target(kind: str, name: str) -> str | None:
    """Return the class, as "module:Class", of this name and kind (or "policy"); None if there is none."""
    if ":" in name:
        return name
    if name in _BUILT_IN:
        return (_POLICIES if kind == "policy" else _PARTS[kind]).get(name)
    return _installed(kind).get(name)


def _installed(kind: str) -> dict[str, str]:
    """Yield the names and targets of a kind (or "policy"): the built-in ones, then those of entry points."""
    found = dict(_POLICIES if kind == "policy" else _PARTS[kind])
    base = SchedulerPolicy if kind == "policy" else KINDS[kind]
    for point in entry_points(group=ENTRY_POINT_GROUP):
        if point.name not in found:
            try:
                cls = _import(point.name, point.value)
            except ValueError:
                continue  # a broken package; naming its policy raises the error
            if issubclass(cls, base):
                found[point.name] = point.value
    return found


def _import(text: str, target: str) -> type[SchedulerPolicy | Part]:
    return import_class(f"policy {text!r}", target, (SchedulerPolicy, Part), "SchedulerPolicy, nor a part")


def _part(kind: str, given: str | Mapping[str, Any] | Part, supply: Supply) -> Part:
    base = KINDS[kind]
    if isinstance(given, base):
        return given
    if isinstance(given, str):
        name, options = parse_named(f"policy {given!r}", given, _all_names(given))
    elif isinstance(given, Mapping) and isinstance(given.get("name"), str):
        options = dict(given)
        name = options.pop("name")
    else:
        raise ValueError(f"{kind}={given!r}: must be a name, a table with a name, or a {base.__name__}")
    target = _target(kind, name)
    if target is None:
        raise ValueError(f"{kind}={name!r}: {unknown(name, _installed(kind))}")
    found = _import(name, target)
    if not issubclass(found, base):
        raise ValueError(f"{kind}={name!r}: {target} is not a subclass of {base.__name__}")
    part = build(f"policy {name!r}", found, options, supply)
    assert isinstance(part, base)
    return part


def _info(name: str, kind: str, cls: type[Any], where: str) -> PolicyInfo:
    bound = getattr(cls, "starvation_bound", "") if kind in ("policy", "order") else ""
    return PolicyInfo(name, kind, summary(cls), options_text(cls), getattr(cls, "source", ""), bound, where)
