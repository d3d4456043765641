"""Finding a policy: by name (entry point group ``aioengine.schedulers``), by dotted path, with options."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from aioengine.schedulers.policy import SchedulerPolicy

ENTRY_POINT_GROUP = "aioengine.schedulers"
BUILT_IN = {"fcfs": "aioengine.schedulers.fcfs:FCFS"}


def available_policies() -> dict[str, str]:
    """Policy names and where each is defined ("module:Class"); built-in and installed ones."""
    found = dict(BUILT_IN)
    for point in entry_points(group=ENTRY_POINT_GROUP):
        found.setdefault(point.name, point.value)
    return found


def load_policy(text: str) -> SchedulerPolicy:
    """Build the policy that ``text`` names: "fcfs", "fcfs:max_wait=2.5" or "package.module:Class".

    Raises ValueError if there is none of this name, it cannot be imported, is no SchedulerPolicy, or
    does not take the options.
    """
    name, _, rest = text.partition(":")
    policies = available_policies()
    if name in policies:
        target, options = policies[name], rest
    elif rest:
        attribute, _, options = rest.partition(":")
        target = f"{name}:{attribute}"
    else:
        close = difflib.get_close_matches(name, policies, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(
            f"no policy {text!r}{hint}; there are {', '.join(sorted(policies))}, "
            "or give 'package.module:Class'"
        )
    return _build(text, _import(text, target), _parse_options(text, options))


def _import(text: str, target: str) -> type[SchedulerPolicy]:
    module, _, attribute = target.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"policy {text!r}: cannot import {target}: {error}") from error
    if not (inspect.isclass(found) and issubclass(found, SchedulerPolicy)):
        raise ValueError(f"policy {text!r}: {target} is not a subclass of SchedulerPolicy")
    return found


def _parse_options(text: str, options: str) -> dict[str, Any]:
    parsed: dict[str, Any] = {}
    for item in filter(None, options.split(",")):
        key, equals, value = item.partition("=")
        if not equals or not key.isidentifier():
            raise ValueError(f"policy {text!r}: option {item!r} is not of the form name=value")
        try:
            parsed[key] = int(value)
        except ValueError:
            try:
                parsed[key] = float(value)
            except ValueError:
                parsed[key] = {"true": True, "false": False}.get(value.lower(), value)
    return parsed


def _build(text: str, policy: type[SchedulerPolicy], options: Mapping[str, Any]) -> SchedulerPolicy:
    signature = inspect.signature(policy)
    try:
        signature.bind(**options)
    except TypeError as error:
        takes = ", ".join(signature.parameters) or "no options"
        raise ValueError(f"policy {text!r}: {error}; it takes {takes}") from error
    return policy(**options)
