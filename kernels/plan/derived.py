"""Values that backends derive from a step's metadata, once for all layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, Self, TypeVar

T = TypeVar("T")


class Derivable:
    """Metadata of one step that remembers what was derived from it."""

    @cached_property
    def _derived(self) -> dict[Any, Any]:
        return {}

    def derive(self, build: Callable[[Self], T]) -> T:
        """Return ``build(self)``, which is called once and kept."""
        if build not in self._derived:
            self._derived[build] = build(self)
        derived: T = self._derived[build]
        return derived

    def provide(self, build: Callable[[Any], T], value: T) -> None:
        """Set the value that :meth:`derive` returns for ``build``."""
        self._derived[build] = value
