"""Decides whether two schemas are clearly disjoint."""

from __future__ import annotations

from typing import Any

_MAX_CONSTANTS = 64
"""Bound on the values of an ``enum`` that is compared."""
_MAX_NAMES = 4
"""Bound on the properties that are compared in two schemas."""


def are_disjoint(one: Any, other: Any) -> bool:
    """Whether it is clear that no value satisfies both schemas."""
    if not isinstance(one, dict) or not isinstance(other, dict):
        return one is False or other is False
    values, others = _constants(one), _constants(other)
    if values is not None and others is not None:
        return not values & others
    common = types(one) & types(other)
    if common != {"object"}:
        return not common
    mine, theirs = _properties(one), _properties(other)
    demanded = frozenset(_required(other)) & mine.keys() & theirs.keys()
    compared = 0
    for name in _required(one):
        if name not in demanded:
            continue
        values, others = _constants(mine[name]), _constants(theirs[name])
        if values is not None and others is not None:
            compared += 1
            if not values & others:
                return True
            if compared == _MAX_NAMES:
                break
    return False


def _required(schema: dict[str, Any]) -> list[str]:
    required = schema.get("required")
    return [n for n in required if isinstance(n, str)] if isinstance(required, list) else []


def _constants(schema: Any) -> set[Any] | None:
    """Return the only values that satisfy the schema; None if unknown."""
    if not isinstance(schema, dict):
        return None
    if "const" in schema:
        values = [schema["const"]]
    elif isinstance(schema.get("enum"), list) and len(schema["enum"]) <= _MAX_CONSTANTS:
        values = schema["enum"]
    else:
        return None
    if any(isinstance(value, (dict, list)) for value in values):
        return None
    # In JSON true is not a number, and 1 equals 1.0.
    return {(isinstance(value, bool), value) for value in values}


_TYPES = frozenset({"object", "array", "string", "number", "boolean", "null"})


def types(schema: dict[str, Any]) -> frozenset[str]:
    """Return the JSON types of the values that may satisfy the schema; integers are numbers."""
    found = schema.get("type")
    names = [found] if isinstance(found, str) else found if isinstance(found, list) else []
    types = frozenset("number" if name == "integer" else name for name in names if isinstance(name, str))
    return types or _TYPES


def _properties(schema: dict[str, Any]) -> dict[str, Any]:
    found = schema.get("properties")
    return found if isinstance(found, dict) else {}
