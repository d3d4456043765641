"""References within a JSON schema."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from typing import Any
from urllib.parse import unquote

from aioengine.errors import RequestInvalid
from aioengine.grammars.budget import MAX_DEPTH


class References:
    """Targets of ``$ref`` in one schema: by JSON pointer or ``$anchor``, also relative to its ``$id``."""

    def __init__(self, root: Any) -> None:
        self._root = root
        own = root.get("$id") if isinstance(root, dict) else None
        self._id = own if isinstance(own, str) else ""
        self._anchors: dict[str, Any] | None = None
        self._targets: dict[str, Any] = {}
        """The targets that were looked for: a long pointer takes long."""

    def target(self, reference: Any) -> Any:
        """Return the target schema. Raises RequestInvalid if there is none."""
        if not isinstance(reference, str):
            raise RequestInvalid("the schema has a $ref that is no text")
        if reference not in self._targets:
            self._targets[reference] = self._find(reference.removeprefix(self._id))
        if not isinstance(self._targets[reference], (dict, bool)):
            raise RequestInvalid(
                f"the schema's reference {reference[:200]!r} leads to no schema within it; "
                "references look like '#/$defs/Name'"
            )
        return self._targets[reference]

    def behind(self, schema: Any, beside: AbstractSet[str]) -> Any:
        """Follow a schema that is only a reference, with keywords ``beside`` it."""
        for _ in range(MAX_DEPTH):
            if not isinstance(schema, dict) or "$ref" not in schema:
                break
            if any(key != "$ref" and key not in beside for key in schema):  # stops at the first
                break
            schema = self.target(schema["$ref"])
        return schema

    def _find(self, pointer: str) -> Any:
        if pointer in ("", "#") or pointer.startswith("#/"):
            found = self._root
            for part in pointer.split("/")[1:]:
                key = unquote(part).replace("~1", "/").replace("~0", "~")
                if isinstance(found, list):
                    at = int(key) if key.isdecimal() and len(key) < 6 else len(found)
                    found = found[at] if at < len(found) else None
                else:
                    found = found.get(key) if isinstance(found, dict) else None
            return found
        if self._anchors is None:
            self._anchors = {}
            todo: list[Any] = [self._root]
            for value in todo:
                if isinstance(value, dict):
                    self._anchors[f"#{value.get('$anchor')}"] = value
                    todo.extend(value.values())
                elif isinstance(value, list):
                    todo.extend(value)
        return self._anchors.get(pointer)
