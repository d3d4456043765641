"""References within a JSON schema."""

from __future__ import annotations

from functools import cached_property
from typing import Any
from urllib.parse import unquote

from aioengine.errors import RequestInvalid


class References:
    """Targets of ``$ref`` in one schema: by JSON pointer or ``$anchor``, also relative to its ``$id``."""

    def __init__(self, root: Any) -> None:
        self._root = root
        own = root.get("$id") if isinstance(root, dict) else None
        self._id = own if isinstance(own, str) else ""
        self._targets: dict[str, Any] = {}
        """The targets that were looked for: a long pointer takes long."""

    def target(self, reference: Any) -> Any:
        """Return the target schema. Raises RequestInvalid if there is none."""
        if not isinstance(reference, str):
            raise RequestInvalid("the schema has a $ref that is no text")
        if reference not in self._targets:
            place = reference.removeprefix(self._id)
            is_pointer = place in ("", "#") or place.startswith("#/")
            self._targets[reference] = self._pointed_at(place) if is_pointer else self._anchors.get(place)
        if not isinstance(self._targets[reference], (dict, bool)):
            raise RequestInvalid(
                f"the schema's reference {reference[:200]!r} leads to no schema within it; "
                "references look like '#/$defs/Name'"
            )
        return self._targets[reference]

    def _pointed_at(self, pointer: str) -> Any:
        found = self._root
        for part in pointer.split("/")[1:]:
            key: Any = unquote(part).replace("~1", "/").replace("~0", "~")
            if isinstance(found, list):
                key = int(key) if key.isdecimal() and len(key) < 6 else len(found)
                found = dict(enumerate(found))
            found = found.get(key) if isinstance(found, dict) else None
        return found

    @cached_property
    def _anchors(self) -> dict[str, Any]:
        anchors, found = dict[str, Any](), [self._root]
        for value in found:
            if isinstance(value, dict):
                anchors[f"#{value.get('$anchor')}"] = value
                found.extend(value.values())
            elif isinstance(value, list):
                found.extend(value)
        return anchors
