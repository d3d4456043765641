"""Bounds on reading a JSON schema, and on what is written for the compiler."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from aioengine.errors import RequestInvalid

MAX_DEPTH = 64
"""Maximum nesting of a JSON schema. References do not count, because each target is written once, at the
top."""
MAX_SCHEMAS = 20_000
"""Bound on the schemas within a schema, those behind references included."""
MAX_CHARACTERS = 2**21
"""Bound on the characters that are written for the schemas of one request, references included."""
MAX_ITEMS = 2**19
"""Bound on the items of all lists in a schema. Writing them as JSON cannot be interrupted."""
MAX_PROPERTIES = 2_000
"""Bound on the properties of one object. The compiler's time grows with the square of their number, because
any other property may follow an optional one: 2,000 take 0.3 s, 5,000 take two to seven."""
MAX_COMPARED = 5_000
"""Bound on the pairs of alternatives of ``oneOf`` that are compared; beyond it they count as overlapping."""


def required_names(schema: dict[str, Any]) -> list[str]:
    """Return the names of required properties. Raises RequestInvalid if there are too many."""
    required = schema.get("required")
    if not isinstance(required, list):
        return []
    check_properties(required)  # each once, so there are no more of them
    return [name for name in required if isinstance(name, str)]


def check_properties(names: Collection[str]) -> None:
    """Raise RequestInvalid if one object has too many properties."""
    if len(names) > MAX_PROPERTIES:
        raise RequestInvalid(
            f"the schema has an object with {len(names)} properties, and at most {MAX_PROPERTIES} are "
            "compiled"
        )


class SchemaBudget:
    """Counts the work of reading the JSON schemas of one request, and what is written for the compiler. A
    short schema can become a long one, because what is behind references may be written once for each."""

    def __init__(self) -> None:
        self._schemas = self._characters = self._pairs = 0

    def take_schema(self) -> None:
        """Count one schema. Raises RequestInvalid if there are too many."""
        self._schemas += 1
        if self._schemas > MAX_SCHEMAS:
            raise RequestInvalid(f"the schema has more than {MAX_SCHEMAS} schemas within it")

    def take(self, *written: Iterable[str]) -> None:
        """Count texts that are written. Raises RequestInvalid if all that is written is too long."""
        self._characters += sum(len(text) + 1 for texts in written for text in texts)
        if self._characters > MAX_CHARACTERS:
            raise RequestInvalid(
                f"the schema has more than {MAX_CHARACTERS} characters once references are followed"
            )

    def take_pairs(self, alternatives: int) -> bool:
        """Count the pairs of so many alternatives; returns whether they may be compared."""
        self._pairs += alternatives * (alternatives - 1) // 2
        return self._pairs <= MAX_COMPARED
