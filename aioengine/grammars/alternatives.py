"""Decides whether schemas are clearly disjoint."""

from __future__ import annotations

from typing import Any, NamedTuple

from aioengine.grammars.budget import required_names

_MAX_COMPARED = 64
"""Bound on the values of an ``enum``, and on the required properties, that are looked at."""
_TYPES = frozenset({"object", "array", "string", "number", "boolean", "null"})


class Traits(NamedTuple):
    """What tells the values of one schema from those of another."""

    types: frozenset[str]
    constants: dict[str | None, set[tuple[bool, Any]]]
    """Required property, or None for the value itself -> its only values, where these are known."""

    @classmethod
    def by(cls, schema: Any) -> Traits:
        """Look at a schema."""
        if not isinstance(schema, dict):
            return cls(frozenset() if schema is False else _TYPES, {})
        properties = schema.get("properties")
        inner = properties if isinstance(properties, dict) else {}
        places = {None: schema} | {name: inner.get(name) for name in required_names(schema)[:_MAX_COMPARED]}
        found = {place: _constants(value) for place, value in places.items()}
        return cls(types(schema), {place: values for place, values in found.items() if values is not None})

    def excludes(self, other: Traits) -> bool:
        """Whether it is clear that no value satisfies both."""
        common = self.types & other.types
        places = self.constants.keys() if common == {"object"} else self.constants.keys() & {None}
        both = places & other.constants.keys()
        return not common or any(self.constants[at].isdisjoint(other.constants[at]) for at in both)


def _constants(schema: Any) -> set[tuple[bool, Any]] | None:
    """Return the only values that satisfy the schema; None if unknown."""
    if not isinstance(schema, dict):
        return None
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if not isinstance(values, list) or len(values) > _MAX_COMPARED:
        return None
    if any(isinstance(value, (dict, list)) for value in values):
        return None
    # In JSON true is not a number, and 1 equals 1.0.
    return {(isinstance(value, bool), value) for value in values}


def types(schema: dict[str, Any]) -> frozenset[str]:
    """Return the JSON types of the values that may satisfy the schema, all of them if that is not clear.
    Integers are numbers."""
    found = schema.get("type")
    names = [found] if isinstance(found, str) else found if isinstance(found, list) else []
    if len(names) > 2 * len(_TYPES):
        return _TYPES
    types = frozenset("number" if name == "integer" else name for name in names if isinstance(name, str))
    return types or _TYPES
