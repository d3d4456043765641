"""Decides whether schemas are clearly disjoint."""

from __future__ import annotations

from itertools import islice
from typing import Any, NamedTuple

from aioengine.grammars.budget import required_names

_MAX_COMPARED = 64
"""Bound on the values of an ``enum``, and on the required properties, that are looked at."""
_MAX_NAMES = 4
"""Bound on the properties that are compared in two schemas."""
_TYPES = frozenset({"object", "array", "string", "number", "boolean", "null"})

Constants = set[tuple[bool, Any]]


class Traits(NamedTuple):
    """What tells the values of one schema from those of another."""

    types: frozenset[str]
    constants: Constants | None
    """The only values; None if unknown."""
    tags: dict[str, Constants]
    """Required property -> its only values, where these are known."""

    @classmethod
    def by(cls, schema: Any) -> Traits:
        """Look at a schema."""
        if not isinstance(schema, dict):
            return cls(frozenset() if schema is False else _TYPES, None, {})
        properties = schema.get("properties")
        inner = properties if isinstance(properties, dict) else {}
        found = {name: _constants(inner.get(name)) for name in required_names(schema)[:_MAX_COMPARED]}
        tags = {name: constants for name, constants in found.items() if constants is not None}
        return cls(types(schema), _constants(schema), tags)

    def excludes(self, other: Traits) -> bool:
        """Whether it is clear that no value satisfies both."""
        if self.constants is not None and other.constants is not None:
            return not self.constants & other.constants
        common = self.types & other.types
        if common != {"object"}:
            return not common
        both = islice((name for name in self.tags if name in other.tags), _MAX_NAMES)
        return any(not self.tags[name] & other.tags[name] for name in both)


def _constants(schema: Any) -> Constants | None:
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
