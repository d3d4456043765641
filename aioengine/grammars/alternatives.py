"""Decides whether schemas are clearly disjoint."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations
from typing import Any, NamedTuple

from aioengine.grammars.limits import check_properties

_MAX_CONSTANTS = 64
"""Bound on the values of an ``enum`` that is compared."""
_MAX_REQUIRED = 64
"""Bound on the required properties of a schema that are looked at."""
_MAX_NAMES = 4
"""Bound on the properties that are compared in two schemas."""
_MAX_TYPES = 16
"""Bound on the names in ``type`` that are looked at; there are seven."""

_Constants = set[tuple[bool, Any]]


class _Told(NamedTuple):
    """Properties by which the values of one schema differ from those of another."""

    types: frozenset[str]
    constants: _Constants | None
    """The only values; None if unknown."""
    tags: dict[str, _Constants]
    """Required property -> its only values, where these are known."""


class Alternatives:
    """Alternatives within one schema. What tells one from others is found out once, although many may refer
    to it."""

    def __init__(self) -> None:
        self._told: dict[int, _Told] = {}
        """What was found out, by the identities of the schemas."""

    def are_disjoint(self, schemas: Iterable[Any]) -> bool:
        """Whether it is clear that no value satisfies two of the schemas."""
        return all(_exclude(one, other) for one, other in combinations(map(self._of, schemas), 2))

    def _of(self, schema: Any) -> _Told:
        told = self._told.get(id(schema))
        if told is None:
            told = self._told[id(schema)] = _told_by(schema)
        return told


def _told_by(schema: Any) -> _Told:
    if not isinstance(schema, dict):
        return _Told(frozenset() if schema is False else _TYPES, None, {})
    properties = _properties(schema)
    tags = {}
    for name in required_names(schema)[:_MAX_REQUIRED]:
        constants = _constants(properties.get(name))
        if constants is not None:
            tags[name] = constants
    return _Told(types(schema), _constants(schema), tags)


def _exclude(one: _Told, other: _Told) -> bool:
    if one.constants is not None and other.constants is not None:
        return not one.constants & other.constants
    common = one.types & other.types
    if common != {"object"}:
        return not common
    compared = 0
    for name, values in one.tags.items():
        if name in other.tags:
            if not values & other.tags[name]:
                return True
            compared += 1
            if compared == _MAX_NAMES:
                break
    return False


def required_names(schema: dict[str, Any]) -> list[str]:
    """Return the names of required properties. Raises RequestInvalid if there are too many."""
    required = schema.get("required")
    if not isinstance(required, list):
        return []
    check_properties(required)  # each once, so there are no more of them
    return [name for name in required if isinstance(name, str)]


def _constants(schema: Any) -> _Constants | None:
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
    """Return the JSON types of the values that may satisfy the schema, all of them if that is not clear.
    Integers are numbers."""
    found = schema.get("type")
    names = [found] if isinstance(found, str) else found if isinstance(found, list) else []
    if len(names) > _MAX_TYPES:
        return _TYPES
    types = frozenset("number" if name == "integer" else name for name in names if isinstance(name, str))
    return types or _TYPES


def _properties(schema: dict[str, Any]) -> dict[str, Any]:
    found = schema.get("properties")
    return found if isinstance(found, dict) else {}
