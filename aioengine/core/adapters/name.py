"""An adapter's name: what it stands for, and what is known of it whatever its version.

Versions come and go (:class:`~aioengine.core.state.AdapterEntry`); a name has at most one that new requests
use, and one that is prepared. It remembers the number of its last version and its failures when there is no
version any more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from types import MappingProxyType

from aioengine.core.state import AdapterEntry
from aioengine.errors import AdapterError, AdapterLoadError
from aioengine.info import AdapterInfo

FIRST_SECONDS = 0.5
LONGEST_SECONDS = 30.0
MAX_REMEMBERED = 4096
"""Names without a version that are remembered. Clients may think up any number of names. When the oldest is
forgotten, it is tried again at once, and its next version has a higher number than any that was forgotten."""


class AdapterName:
    """A name that is registered, that a caller works on, or that is remembered."""

    __slots__ = (
        "claims",
        "current",
        "described",
        "error",
        "expected",
        "failed_at",
        "failures",
        "label",
        "last_version",
        "loading",
        "lock",
        "looked_up",
        "pin_settled",
        "prepared",
        "source",
        "tried_again_at",
        "unloads",
        "users",
    )

    def __init__(self, label: str, last_version: int) -> None:
        self.label = label
        self.current: AdapterEntry | None = None
        """The version that new requests use."""
        self.prepared: tuple[AdapterEntry, str | None] | None = None
        """A version that is published on demand, and the path that it was prepared from."""
        self.described: AdapterInfo | None = None
        """Description of the current version, as it was when that was last found idle."""
        self.last_version = last_version
        self.expected = ""
        """The digest of the current version, or of the one that a look-up finds next; "": any."""
        self.looked_up = False
        """Whether a look-up finds its folder."""
        self.source: str | None = None
        """What is looked up: "hf:..." or a URL; None: the name itself, by the resolver."""
        # Who works on it
        self.loading = False
        """Whether a version is looked up or read for a caller."""
        self.unloads = 0
        """Callers that unload it."""
        self.lock: AbstractAsyncContextManager[object] | None = None
        """Lock of those who change it; made by the first."""
        self.users = 0
        """Callers who hold the lock or wait for it."""
        self.claims = 0
        """Callers who are pinning it."""
        self.pin_settled = False
        """Whether it stays pinned if they fail: it was pinned before, or one of them has succeeded."""
        # Its failures in a row
        self.failures = 0
        self.error: AdapterError | None = None
        self.failed_at = self.tried_again_at = 0.0

    @property
    def in_use(self) -> bool:
        works = self.prepared or self.users or self.unloads or self.claims
        return bool(self.current or self.looked_up or self.expected or works)

    @property
    def pinned(self) -> bool:
        return self.current is not None and self.current.pinned

    # Versions

    def take_prepared(self) -> tuple[AdapterEntry | None, str | None]:
        """Return the prepared version and the path that it was prepared from, and forget it."""
        prepared, self.prepared = self.prepared, None
        return (None, None) if prepared is None else prepared

    def look_up(self, source: str | None) -> None:
        """Note that its folder is found by a look-up."""
        self.looked_up, self.source = True, source

    def forget_source(self) -> None:
        """Note that no look-up finds its folder."""
        self.looked_up, self.source = False, None

    # Loads and unloads

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

    # Failures

    def fail(self, error: AdapterError, now: float) -> None:
        """Count a failure. After one a retry may follow at once; from the second in a row on there is a
        pause, which doubles each time. ``error`` is kept, so it must be frameless. Those that waited for the
        same read say the same error at about the same time, which counts once."""
        if self.error is error and now < self.failed_at + FIRST_SECONDS:
            return
        self.failures += 1
        pause = FIRST_SECONDS * 2.0 ** min(self.failures - 2, 10) if self.failures > 1 else 0.0
        self.error, self.failed_at = error, now
        self.tried_again_at = now + min(LONGEST_SECONDS, pause)

    def succeed(self) -> None:
        """Forget the failures, because it has been read."""
        self.failures, self.error = 0, None

    def check_worth_a_try(self, now: float) -> None:
        """Raise its last error again if its pause is not over."""
        error, seconds = self.error, self.tried_again_at - now
        if error is not None and seconds > 0:
            raise type(error)(
                f"{error.reason} (failed {self.failures} times; requests try it again in {seconds:.1f} s)",
                name=self.label,
                path=error.path,
                transient=error.transient,
            )


class NameTable:
    """All names."""

    def __init__(self) -> None:
        self._in_use: dict[str, AdapterName] = {}
        self._remembered: dict[str, AdapterName] = {}
        """The one that was in use last is at the end."""
        self._forgotten_version = 0
        """The highest of the names that were forgotten."""
        self._current: dict[str, AdapterEntry] = {}
        self.current = MappingProxyType(self._current)
        """The current versions by name."""
        self.in_use = MappingProxyType(self._in_use)

    def find(self, label: str) -> AdapterName | None:
        """Return what is known of a name; None: nothing."""
        return self._in_use.get(label) or self._remembered.get(label)

    def of(self, label: str) -> AdapterName:
        """Return the object of a name that will be in use, and make it first if there is none."""
        name = self._in_use.get(label)
        if name is None:
            name = self._remembered.pop(label, None) or AdapterName(label, self._forgotten_version)
            self._in_use[label] = name
        return name

    def tidy(self, name: AdapterName) -> None:
        """Only remember a name that is not in use any more."""
        if name.in_use or self._in_use.get(name.label) is not name:
            return
        del self._in_use[name.label]
        if name.failures or name.last_version > self._forgotten_version:
            self._remembered[name.label] = name
        while len(self._remembered) > MAX_REMEMBERED:
            oldest = self._remembered.pop(next(iter(self._remembered)))
            self._forgotten_version = max(self._forgotten_version, oldest.last_version)

    def next_version(self, label: str) -> int:
        """Return a number that no version of this name had."""
        name = self.of(label)
        name.last_version += 1
        self.tidy(name)
        return name.last_version

    def publish(self, entry: AdapterEntry) -> None:
        """Make a version the current one of its name, which has none."""
        self.of(entry.label).current = self._current[entry.label] = entry

    def withdraw(self, entry: AdapterEntry) -> None:
        """Note that a version is not the current one of its name any more."""
        del self._current[entry.label]
        name = self._in_use[entry.label]
        name.current = None
        self.tidy(name)

    # Failures

    def fail(self, label: str, error: AdapterError, now: float) -> None:
        """Count a failure; see :meth:`AdapterName.fail`."""
        name = self.of(label)
        name.fail(error, now)
        self.tidy(name)

    def failures(self, label: str) -> int:
        """Return how often a name has failed in a row."""
        name = self.find(label)
        return 0 if name is None else name.failures

    def check_worth_a_try(self, label: str, now: float) -> None:
        """Raise the last error of a name again if its pause is not over."""
        name = self.find(label)
        if name is not None:
            name.check_worth_a_try(now)
