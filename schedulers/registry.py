"""Finding policies and parts by name, and building them with options.

A policy is named by text: "fcfs", "vtc:input_weight=1,output_weight=2", "edf+gdsf+lookahead",
"package.module:Class", "my_policy.py:MyPolicy" (a file, relative to the working directory); or by a table
such as ``{"order": "edf", "replace": {"name": "gdsf"}, "max_wait": 2}``. Installed packages add to the
built-in names through the entry point group ``aioengine.schedulers`` (whole policies, and parts, which are
told apart by their base class).
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any, NamedTuple, get_args, get_type_hints

import msgspec

from aioengine.schedulers.nearest import nearest
from aioengine.schedulers.parts.base import Ordering, Part, Preemption, Prefetch, Replacement
from aioengine.schedulers.parts.compose import Composed
from aioengine.schedulers.policy import SchedulerPolicy
from aioengine.schedulers.policy_file import import_file

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
    "chameleon": f"{_POLICY}.chameleon:Chameleon",
    "oracle": f"{_POLICY}.oracle:Oracle",
}
_PARTS: dict[str, dict[str, str]] = {
    "order": {
        "fcfs": f"{_POLICY}.fcfs:FairArrival",
        "vllm": f"{_POLICY}.vllm:VLLMOrder",
        "slora": f"{_POLICY}.slora:SLoRA",
        "vtc": f"{_POLICY}.vtc:VTC",
        "drr": f"{_POLICY}.drr:DRR",
        "sjf": f"{_POLICY}.sjf:SJF",
        "edf": f"{_POLICY}.edf:EDF",
        "priority": f"{_POLICY}.priority:Priority",
        "chameleon": f"{_POLICY}.chameleon:ChameleonOrder",
    },
    "replace": {
        "lru": f"{_PART}.lru:LRU",
        "lfu": f"{_PART}.lfu:LFU",
        "gdsf": f"{_PART}.gdsf:GDSF",
        "chameleon": f"{_POLICY}.chameleon:ChameleonCache",
        "belady": f"{_POLICY}.oracle:Belady",
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


class PolicyInfo(NamedTuple):
    """What ``aioengine policies`` shows of a policy or part."""

    name: str
    kind: str
    """"policy", or a part's kind: "order", "replace", "prefetch", "preempt"."""
    summary: str
    options: str
    """As in "max_wait: float = 1.0"; empty if it takes none."""
    source: str
    starvation_bound: str
    where: str
    """"module:Class"."""


def available_policies() -> dict[str, PolicyInfo]:
    """What can stand alone as a policy, by name: whole policies, and every part with the other parts
    at their defaults. A package whose entry point cannot be imported is left out."""
    found: dict[str, PolicyInfo] = {}
    for name, target in _installed("policy").items():
        found[name] = _info(name, "policy", _import(name, target), target)
    for kind in KINDS:
        for name, info in available_parts(kind).items():
            found.setdefault(name, info)
    del found["none"]
    return found


def available_parts(kind: str) -> dict[str, PolicyInfo]:
    """The parts of a kind ("order", "replace", "prefetch" or "preempt"), by name."""
    return {
        name: _info(name, kind, _import(name, target), target) for name, target in _installed(kind).items()
    }


Supply = Mapping[str, Callable[[], Any]]
"""By the name of a constructor's parameter: what makes its value, for values that text cannot give."""


def load_policy(spec: str | Mapping[str, Any], *, supply: Supply | None = None) -> SchedulerPolicy:
    """Build the policy that ``spec`` names; see the module's docstring for the forms. ``supply`` makes
    values for constructor parameters that ``spec`` leaves out: ``future``, say, where a trace is replayed.

    Raises ValueError if there is none of this name, it cannot be imported, or an option is unknown or
    out of range.
    """
    supply = supply or {}
    if isinstance(spec, str):
        tokens = [_parse_token(spec, token) for token in spec.split("+")]
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
    """A policy out of parts, each given by name (with options: "gdsf:x=1", or a table with "name"), or
    as an instance. Left out: order fcfs, replace lru, prefetch lookahead (or what the order prefers),
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


def _parse_token(text: str, token: str) -> tuple[str, dict[str, Any]]:
    """ "gdsf:x=1,y=2" -> ("gdsf", {"x": "1", "y": "2"}); "module:Class:x=1" likewise."""
    name, _, rest = token.strip().partition(":")
    first = rest.split(",")[0]
    if rest and "=" not in first.partition(":")[0] and name not in _all_names():  # a dotted path
        attribute, _, rest = rest.partition(":")
        name = f"{name}:{attribute}"
    options: dict[str, Any] = {}
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        if not equals or not key.strip().isidentifier():
            raise ValueError(f"policy {text!r}: option {item!r} is not of the form name=value")
        options[key.strip()] = value.strip()
    return name, options


def _single(text: str, name: str, options: dict[str, Any], supply: Supply) -> SchedulerPolicy:
    target = _installed("policy").get(name) or (name if ":" in name else None)
    if target is not None:
        found = _import(text, target)
        if issubclass(found, SchedulerPolicy):
            policy = _build(text, found, options, supply)
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
    """The first kind that has a part of this name and none yet."""
    if ":" in name:
        found = _import(text, name)
        for kind, base in KINDS.items():
            if issubclass(found, base) and kind not in taken:
                return kind
        raise ValueError(f"policy {text!r}: {name} is no part, or one of its kind is given already")
    for point in entry_points(group=ENTRY_POINT_GROUP):
        if point.name == name:
            _import(text, point.value)  # raises if it is broken
    having = [kind for kind in KINDS if name in _installed(kind)]
    for kind in having:
        if kind not in taken:
            return kind
    if having:
        raise ValueError(f"policy {text!r}: two parts of the kind {having[0]!r}, the second {name!r}")
    raise ValueError(f"policy {text!r}: {_unknown(name, sorted(_all_names()))}")


def _unknown(name: str, known: list[str]) -> str:
    hint = nearest(name, known)
    names = ", ".join(known)
    return f"there is no {name!r}{hint}; known are {names}, or give 'package.module:Class' or 'file.py:Class'"


def _all_names() -> set[str]:
    return set(_installed("policy")).union(*(_installed(kind) for kind in KINDS))


# Classes


def _installed(kind: str) -> dict[str, str]:
    """Names and targets of a kind (or "policy"): the built-in ones, then those of entry points."""
    found = dict(_POLICIES if kind == "policy" else _PARTS[kind])
    base = SchedulerPolicy if kind == "policy" else KINDS[kind]
    for point in entry_points(group=ENTRY_POINT_GROUP):
        if point.name not in found:
            try:
                cls = _import(point.name, point.value)
            except ValueError:
                continue  # somebody's broken package; whoever asks for it by name is told
            if issubclass(cls, base):
                found[point.name] = point.value
    return found


def _import(text: str, target: str) -> type[SchedulerPolicy | Part]:
    module, _, attribute = target.partition(":")
    try:
        if module.endswith(".py"):
            found = import_file(module, attribute)
        else:
            found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"policy {text!r}: cannot import {target}: {error}") from error
    if not (inspect.isclass(found) and issubclass(found, (SchedulerPolicy, Part))):
        raise ValueError(f"policy {text!r}: {target} is not a subclass of SchedulerPolicy, nor a part")
    return found


def _part(kind: str, given: str | Mapping[str, Any] | Part, supply: Supply) -> Part:
    base = KINDS[kind]
    if isinstance(given, base):
        return given
    if isinstance(given, str):
        name, options = _parse_token(given, given)
    elif isinstance(given, Mapping) and isinstance(given.get("name"), str):
        options = dict(given)
        name = options.pop("name")
    else:
        raise ValueError(f"{kind}={given!r}: must be a name, a table with a name, or a {base.__name__}")
    known = _installed(kind)
    target = known.get(name) or (name if ":" in name else None)
    if target is None:
        raise ValueError(f"{kind}={name!r}: {_unknown(name, sorted(known))}")
    found = _import(name, target)
    if not issubclass(found, base):
        raise ValueError(f"{kind}={name!r}: {target} is not a subclass of {base.__name__}")
    part = _build(name, found, options, supply)
    assert isinstance(part, base)
    return part


def _build(text: str, cls: type[Any], options: Mapping[str, Any], supply: Supply) -> Any:
    """An instance, its options checked and converted by the types of its constructor."""
    fields = _fields(cls)
    for key in options:
        if key not in fields:
            hint = nearest(key, fields)
            takes = ", ".join(fields) or "no options"
            raise ValueError(f"policy {text!r}: unknown option {key!r}{hint}; it takes {takes}")
    values: dict[str, Any] = {}
    for key, value in options.items():
        try:
            values[key] = msgspec.convert(value, fields[key][0], strict=False)
        except msgspec.ValidationError as error:
            raise ValueError(f"policy {text!r}: option {key}={value!r}: {error}") from error
    values |= {key: make() for key, make in supply.items() if key in fields and key not in values}
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"policy {text!r}: {error}") from error


def _fields(cls: type[Any]) -> dict[str, tuple[Any, Any]]:
    """Constructor options: name -> (type, default)."""
    if cls.__init__ is object.__init__:
        return {}
    hints = get_type_hints(cls.__init__)
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    return {p.name: (hints.get(p.name, Any), p.default) for p in parameters}


def _info(name: str, kind: str, cls: type[Any], where: str) -> PolicyInfo:
    summary = (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " ")
    options = []
    for option, (hint, default) in _fields(cls).items():
        shown = str(hint) if get_args(hint) else getattr(hint, "__name__", str(hint))
        shown = re.sub(r"[a-z_.]+\.([A-Z])", r"\1", shown)
        options.append(
            f"{option}: {shown}" + ("" if default is inspect.Parameter.empty else f" = {default!r}")
        )
    bound = getattr(cls, "starvation_bound", "") if kind in ("policy", "order") else ""
    return PolicyInfo(name, kind, summary, ", ".join(options), getattr(cls, "source", ""), bound, where)
