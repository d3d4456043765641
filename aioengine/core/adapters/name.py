"""An adapter's name: what it stands for, and what is known of it whatever its version.

Versions come and go (:class:`~aioengine.core.state.AdapterEntry`); a name has at most one that new requests
use, and one that is prepared. It remembers the number of its last version and its failures when there is no
version any more. Pins belong to names: the next version of an adapter takes over its predecessor's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass
from types import MappingProxyType

from aioengine import events
from aioengine.core.guard import PolicyGuard
from aioengine.core.record_views import CoreAdapterView
from aioengine.core.state import AdapterEntry
from aioengine.errors import AdapterError, AdapterLoadError, ConfigError
from aioengine.info import AdapterInfo

FIRST_SECONDS = 0.5
LONGEST_SECONDS = 30.0
MAX_REMEMBERED = 4096
"""Names without a version that are remembered. Clients may think up any number of names. When the oldest is
forgotten, it is tried again at once, and its next version has a higher number than any that was forgotten."""


@dataclass(slots=True, eq=False)
class AdapterName:
    """A name that is registered, that a caller works on, or that is remembered."""

    label: str
    last_version: int
    current: AdapterEntry | None = None
    """The version that new requests use."""
    prepared: tuple[AdapterEntry, str | None] | None = None
    """A version that is published on demand, and the path that it was prepared from."""
    described: AdapterInfo | None = None
    """Description of the current version, as it was when that was last found idle."""
    expected: str = ""
    """The digest of the current version, or of the one that a look-up finds next; "": any."""
    looked_up: bool = False
    """Whether a look-up finds its folder."""
    source: str | None = None
    """What is looked up: "hf:..." or a URL; None: the name itself, by the resolver."""
    # Who works on it
    loading: bool = False
    """Whether a version is looked up or read for a caller."""
    unloads: int = 0
    """Callers that unload it."""
    lock: AbstractAsyncContextManager[object] | None = None
    """Lock of those who change it; made by the first."""
    users: int = 0
    """Callers who hold the lock or wait for it."""
    claims: int = 0
    """Callers who are pinning it."""
    pin_settled: bool = False
    """Whether it stays pinned if they fail: it was pinned before, or one of them has succeeded."""
    # Its failures in a row
    failures: int = 0
    error: AdapterError | None = None
    failed_at: float = 0.0
    tried_again_at: float = 0.0

    @property
    def in_use(self) -> bool:
        works = self.prepared or self.users or self.unloads or self.claims
        return bool(self.current or self.looked_up or self.expected or works)

    @property
    def pinned(self) -> bool:
        return self.current is not None and self.current.pinned

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

    def expect(self, digest: str) -> None:
        """Refuse any other content, until it is replaced or unloaded."""
        self.expected = digest
        self.succeed()  # whatever has failed, it was of other files
        if self.current is not None:
            self.current.expected = digest

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
    """All names, and the versions that policies know, by the names that these have for them."""

    def __init__(self, num_slots: int, known: dict[str, AdapterEntry], guard: PolicyGuard) -> None:
        self._in_use: dict[str, AdapterName] = {}
        self._remembered: dict[str, AdapterName] = {}
        """The one that was in use last is at the end."""
        self._forgotten_version = 0
        """The highest of the names that were forgotten."""
        self._current: dict[str, AdapterEntry] = {}
        self.current = MappingProxyType(self._current)
        """The current versions by name."""
        self.in_use = MappingProxyType(self._in_use)
        self.known = known
        """Versions that requests may wait for or run on, superseded ones included."""
        self.views: dict[str, CoreAdapterView] = {}
        """Their views, by the same names."""
        self.pinned = 0
        """Number of pinned adapters."""
        self._num_slots = num_slots
        self._guard = guard

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

    # Versions

    def next_version(self, label: str) -> int:
        """Return a number that no version of this name had."""
        name = self.of(label)
        name.last_version += 1
        self.tidy(name)
        return name.last_version

    def publish(self, entry: AdapterEntry) -> None:
        """Make a version the current one of its name, which has none."""
        self.of(entry.label).current = self._current[entry.label] = entry
        self._know(entry, entry.label)

    def withdraw(self, entry: AdapterEntry, now: float) -> None:
        """Note that a version is not the current one of its name any more. Policies call it "name@version"
        from now on."""
        del self._current[entry.label]
        name = self._in_use[entry.label]
        name.current = None
        self.tidy(name)
        self.forget(entry)
        self._know(entry, f"{entry.label}@{entry.version}")
        self._guard.tell("adapter_retired", now, adapter=entry.name, was=entry.label)

    def forget(self, entry: AdapterEntry) -> None:
        """Note that policies do not know a version any more."""
        del self.known[entry.name], self.views[entry.name]

    def _know(self, entry: AdapterEntry, name: str) -> None:
        entry.name = name
        self.known[name], self.views[name] = entry, entry.view

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

    # Pins. The core places a pinned adapter in a slot as soon as one is idle, and never takes it out.

    @contextmanager
    def claim(self, label: str, *, force: bool, clock: Callable[[], float]) -> Iterator[None]:
        """Context that counts a name as pinned while it is on its way to a slot. If the block fails, it is
        unpinned, unless it was pinned before or other callers have pinned it too.

        Raises ConfigError if that would leave no slot for other adapters; with ``force``, only if this one
        has no slot either.
        """
        others = {other.label for other in self._in_use.values() if other.claims or other.pinned} - {label}
        if len(others) >= (self._num_slots if force else self._num_slots - 1):
            todo = "unpin one or raise LoRAConfig.max_loras"
            if not force:
                todo = f"one must stay free for other adapters: {todo}, or use force if no others are served"
            raise ConfigError(
                f"adapter {label!r} cannot be pinned: {len(others)} of max_loras={self._num_slots} slots are "
                f"pinned already ({', '.join(sorted(others)) or 'none'}); {todo}"
            )
        name = self.of(label)
        if not name.claims:
            name.pin_settled = name.pinned
        name.claims += 1
        try:
            yield
            name.pin_settled = name.pinned
        except BaseException:
            if name.current is not None and not name.pin_settled and name.claims == 1:
                self._set_pinned(name.current, False, clock())
            raise
        finally:
            name.claims -= 1
            self.tidy(name)

    def pin(self, entry: AdapterEntry, now: float) -> None:
        self._set_pinned(entry, True, now)

    def unpin(self, entry: AdapterEntry, now: float) -> None:
        """Remove the pin, whoever holds it."""
        if (name := self.find(entry.label)) is not None:
            name.pin_settled = False
        self._set_pinned(entry, False, now)

    def hand_over(self, old: AdapterEntry, new: AdapterEntry, now: float) -> None:
        """Transfer the pin of ``old`` to ``new``, which replaces it."""
        if old.pinned:
            self._set_pinned(old, False, now)
            self._set_pinned(new, True, now)

    def _set_pinned(self, entry: AdapterEntry, pinned: bool, now: float) -> None:
        if entry.pinned != pinned:
            entry.pinned = pinned
            self.pinned += 1 if pinned else -1
            self._guard.say(events.AdapterPinned, entry, now, pinned=pinned)
