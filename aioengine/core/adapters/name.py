"""An adapter's name: what it stands for, and what is known of it whatever its version."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, contextmanager

from aioengine.core.state import AdapterEntry
from aioengine.errors import AdapterLoadError


class AdapterName:
    """A name that is registered, or that a caller works on."""

    __slots__ = (
        "label",
        "loading",
        "lock",
        "looked_up",
        "prepared",
        "source",
        "unloads",
        "users",
    )

    def __init__(self, label: str) -> None:
        self.label = label
        self.looked_up = False
        """Whether a look-up finds its folder."""
        self.source: str | None = None
        """What is looked up: "hf:..." or a URL; None: the name itself, by the resolver."""
        self.prepared: tuple[AdapterEntry, str | None] | None = None
        """A version that is published on demand, and the path that it was prepared from."""
        self.loading = False
        """Whether a version is looked up or read for a caller."""
        self.unloads = 0
        """Callers that unload it."""
        self.lock: AbstractAsyncContextManager[object] | None = None
        """Lock of those who change it; made by the first."""
        self.users = 0
        """Callers who hold the lock or wait for it."""

    @property
    def is_unused(self) -> bool:
        """Whether nothing is lost with this object."""
        return not (self.looked_up or self.prepared or self.users or self.unloads)

    def look_up(self, source: str | None) -> None:
        """Note that its folder is found by a look-up."""
        self.looked_up, self.source = True, source

    def forget_source(self) -> bool:
        """Note that no look-up finds its folder. Returns whether one did."""
        was, self.looked_up, self.source = self.looked_up, False, None
        return was

    def check_not_unloaded(self) -> None:
        """Raise AdapterLoadError if it is being unloaded. An unload does not wait for loads, because these
        may hang."""
        if self.unloads:
            raise AdapterLoadError("it was unloaded while it was being loaded", name=self.label)

    @contextmanager
    def load(self) -> Iterator[None]:
        """Context in which a version is looked up or read. Raises AdapterLoadError if it is being
        unloaded."""
        self.check_not_unloaded()
        self.loading = True
        try:
            yield
        finally:
            self.loading = False

    def take_prepared(self) -> tuple[AdapterEntry | None, str | None]:
        """Return the prepared version and the path that it was prepared from, and forget it."""
        prepared, self.prepared = self.prepared, None
        return (None, None) if prepared is None else prepared


class NameTable:
    """The names that are in use; those that are not are forgotten."""

    def __init__(self) -> None:
        self._names: dict[str, AdapterName] = {}

    def __iter__(self) -> Iterator[AdapterName]:
        return iter(self._names.values())

    def get(self, label: str) -> AdapterName | None:
        return self._names.get(label)

    def of(self, label: str) -> AdapterName:
        """Return the object of a name, and make it first if there is none."""
        return self._names.setdefault(label, AdapterName(label))

    def tidy(self, name: AdapterName) -> None:
        """Forget the name if it is not used any more."""
        if name.is_unused and self._names.get(name.label) is name:
            del self._names[name.label]
