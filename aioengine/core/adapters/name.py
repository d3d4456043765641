"""An adapter's name: what it stands for, and what is known of it whatever its version.

Versions come and go (:class:`~aioengine.core.state.AdapterEntry`); a name has at most one that new requests
use, and one that is prepared. It remembers the number of its last version and its failures when there is no
version any more. Pins belong to names: the next version of an adapter takes over its predecessor's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from weakref import WeakValueDictionary

from aioengine import events
from aioengine.core.guard import PolicyGuard
from aioengine.core.state import AdapterEntry, AdapterFiles, CoreAdapterView
from aioengine.errors import AdapterError, AdapterNotFound, ConfigError
from aioengine.schedulers.policy import Location

FIRST_SECONDS = 0.5
LONGEST_SECONDS = 30.0
MAX_REMEMBERED = 4096
"""Names without a version that are remembered. Clients may think up any number of names. When the oldest is
forgotten, it is tried again at once, and its next version has a higher number than any that was forgotten."""


@dataclass(slots=True, eq=False, weakref_slot=True)
class AdapterName:
    """A name that is registered, that a caller works on, or that is remembered. What changes it for
    longer than that work keeps it in the table of names."""

    label: str
    names: NameTable = field(repr=False)
    last_version: int
    current: AdapterEntry | None = None
    """The version that new requests use."""
    prepared: AdapterEntry | None = None
    """A version that is published on demand."""
    expected: str = ""
    """The digest of the current version, or of the one that a look-up finds next; "": any."""
    source: str | None = None
    """What is looked up to find its folder: "hf:..." or a URL; "": the name itself, by the resolver; None: it
    is not looked up."""
    # Who works on it
    lock: AbstractAsyncContextManager[None] | None = None
    """Held while versions of it are looked up or read, or it is unloaded."""
    stop_load: Callable[[], None] | None = None
    """Ends the look-up or read for a caller that is under way; None: there is none."""
    unloads: int = 0
    """Callers that unload it."""
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
    def is_known(self) -> bool:
        """Whether requests can use it, or could once it has been looked up."""
        return self.current is not None or self.source is not None

    @property
    def in_use(self) -> bool:
        return bool(self.is_known or self.expected or self.prepared)

    @property
    def pinned(self) -> bool:
        return self.current is not None and self.current.pinned

    def resolve(self, version: str | None = None) -> AdapterEntry:
        """Return the current version, or one by its number, which may be replaced but has requests still.
        Raises AdapterNotFound."""
        if self.current is None:
            raise self.names.not_found(self.label if version is None else f"{self.label}@{version}")
        if version is None or version == str(self.current.version):
            return self.current
        name = f"{self.label}@{version}"
        if name not in self.names.known:
            gone = (
                f"this version is gone: the current one is {self.current.version}, and a replaced one goes "
            )
            raise AdapterNotFound(f"{gone}when its last request has ended", name=name)
        return self.names.known[name]

    # Loading

    def declare(
        self,
        path: str,
        *,
        source: str | None = None,
        files: AdapterFiles | None = None,
        number: int | None = None,
    ) -> AdapterEntry:
        """Declare a new version. No request can use it until it is published, by :meth:`replace`.
        ``source``: what was looked up to find its path. ``files``: read in place of a folder. ``number``
        None: the next one."""
        if number is None:
            number = self.last_version = self.last_version + 1
            self.names.keep(self)
        uid = self.names.next_uid
        self.names.next_uid += 1
        entry = AdapterEntry(uid, self.label, number, path, source=source, files=files)
        self.names.entries[uid] = entry
        return entry

    def register(self, path: str, now: float, *, source: str | None = None) -> AdapterEntry:
        """Let new requests use what is in this folder, which is read when one first needs it."""
        entry = self.declare(path, source=source)
        self.replace(entry, now)
        return entry

    def load(self, now: float, entry: AdapterEntry | None = None) -> None:
        """Bring a version (None: the current one) to the CPU cache as soon as there is room, although no
        request waits for it. If it is already being read and there is no room when it arrives, it is read
        again. ``entry.error`` tells whether it failed."""
        entry = entry or self.resolve()
        entry.error = None
        if entry.location is Location.DISK or entry.location is Location.LOADING:
            entry.wanted_since = now
            self.names.wanted[entry.uid] = entry
            self.names.guard.changes += 1

    def replace(self, entry: AdapterEntry, now: float) -> None:
        """Let new requests use this version, and give it its predecessor's pin. The predecessor only finishes
        its accepted requests."""
        entry.change("publish")
        guard, old = self.names.guard, self.current
        replaces = None if old is None else old.version
        if old is None:
            entry.expected = self.expected
        else:
            self.expected = ""
            if old.pinned:
                self._set_pinned(old, False, now)
                self._set_pinned(entry, True, now)
            self.retire(old, now)
        self.source, self.current, self.names.current[self.label] = entry.source, entry, entry
        self.names.keep(self)
        self.names.know(entry, self.label)
        if entry.location is Location.CPU:
            guard.tell("adapter_loaded", now, adapter=entry.name)
        guard.say(events.AdapterRegistered, entry, now, path=entry.path, replaces=replaces)

    def take_prepared(self) -> AdapterEntry | None:
        """Return the prepared version, and forget it."""
        prepared, self.prepared = self.prepared, None
        self.names.keep(self)
        return prepared

    def expect(self, digest: str) -> None:
        """Refuse any other content, until it is replaced or unloaded."""
        self.expected = digest
        self.succeed()  # whatever has failed, it was of other files
        if self.current is not None:
            self.current.expected = digest
        self.names.keep(self)

    # Unloading

    def unload(self, now: float) -> None:
        """Forget where it comes from, and accept no new requests on it."""
        self.source, self.expected = None, ""
        if self.current is not None:
            self.retire(self.current, now)
        self.names.keep(self)

    def retire(self, entry: AdapterEntry, now: float) -> None:
        """Accept no new requests on a version; it is freed when the accepted ones have ended. Policies call
        it "name@version" from now on."""
        entry.change("retire")
        self.names.forget_want(entry)
        self.names.retired[entry.uid] = entry
        if self.current is entry:
            if entry.pinned:
                self.unpin(now)
            self.current = None
            del self.names.current[self.label]
            self.names.keep(self)
            self.names.forget(entry)
            self.names.know(entry, f"{self.label}@{entry.version}")
            self.names.guard.tell("adapter_retired", now, adapter=entry.name, was=self.label)

    # Pins. The core places a pinned adapter in a slot as soon as one is idle, and never takes it out.

    @contextmanager
    def claim(self, *, force: bool, clock: Callable[[], float]) -> Iterator[None]:
        """Context that counts it as pinned while it is on its way to a slot. If the block fails, it is
        unpinned, unless it was pinned before or other callers have pinned it too. Raises ConfigError if that
        would leave no slot for other adapters; with ``force``, only if this one has no slot either."""
        slots = self.names.num_slots
        others = {name.label for name in self.names.by_label.values() if name.claims or name.pinned}
        others.discard(self.label)
        if len(others) >= (slots if force else slots - 1):
            why = f"{len(others)} of max_loras={slots} slots are pinned already ({', '.join(sorted(others))})"
            todo = "unpin one or raise LoRAConfig.max_loras"
            if not force:
                todo = f"one must stay free for other adapters: {todo}, or use force if no others are served"
            raise ConfigError(f"adapter {self.label!r} cannot be pinned: {why}; {todo}")
        if not self.claims:
            self.pin_settled = self.pinned
        self.claims += 1
        try:
            yield
            self.pin_settled = self.pinned
        except BaseException:
            if self.current is not None and not self.pin_settled and self.claims == 1:
                self._set_pinned(self.current, False, clock())
            raise
        finally:
            self.claims -= 1

    def pin(self, now: float) -> None:
        self._set_pinned(self.resolve(), True, now)

    def unpin(self, now: float) -> None:
        """Remove the pin, whoever holds it."""
        self.pin_settled = False
        self._set_pinned(self.resolve(), False, now)

    def _set_pinned(self, entry: AdapterEntry, pinned: bool, now: float) -> None:
        if entry.pinned != pinned:
            entry.pinned = pinned
            self.names.pinned += 1 if pinned else -1
            self.names.guard.say(events.AdapterPinned, entry, now, pinned=pinned)

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
        self.names.keep(self)

    def succeed(self) -> None:
        """Forget the failures, because it has been read."""
        self.failures, self.error = 0, None

    def check_worth_a_try(self, now: float) -> None:
        """Raise its last error again if its pause is not over."""
        error, seconds = self.error, self.tried_again_at - now
        if error is not None and seconds > 0:
            again = f"(failed {self.failures} times; requests try it again in {seconds:.1f} s)"
            text = f"{error.reason} {again}"
            raise type(error)(text, name=self.label, path=error.path, transient=error.transient)


class NameTable:
    """Finds names, and their versions by the names that policies have for them."""

    def __init__(self, num_slots: int, known: dict[str, AdapterEntry], guard: PolicyGuard) -> None:
        self.by_label = WeakValueDictionary[str, AdapterName]()
        """All that anybody refers to."""
        self.in_use: dict[str, AdapterName] = {}
        self._remembered: dict[str, AdapterName] = {}
        """The one that was in use last is at the end."""
        self._forgotten_version = 0
        """The highest of the names that were forgotten."""
        self.current: dict[str, AdapterEntry] = {}
        """The current versions by name."""
        self.entries: dict[int, AdapterEntry] = {}
        """All versions, by uid."""
        self.wanted: dict[int, AdapterEntry] = {}
        """Those that a caller waits for to be read."""
        self.retired: dict[int, AdapterEntry] = {}
        self.known = known
        """Versions that requests may wait for or run on, superseded ones included."""
        self.views: dict[str, CoreAdapterView] = {}
        """Their views, by the same names."""
        self.pinned = 0
        """Number of pinned adapters."""
        self.next_uid = 0
        self.num_slots = num_slots
        self.guard = guard

    def of(self, label: str) -> AdapterName:
        """Return the object of a name, the same for all callers; a new one if nothing is known of it."""
        name = self.by_label.get(label)
        if name is None:
            name = self.by_label[label] = AdapterName(label, self, self._forgotten_version)
        return name

    def keep(self, name: AdapterName) -> None:
        """Put a name that has changed where it is found again: as long as it is in use, and for some time
        after."""
        self._remembered.pop(name.label, None)
        if name.in_use:
            self.in_use[name.label] = name
            return
        self.in_use.pop(name.label, None)
        if name.failures or name.last_version > self._forgotten_version:
            self._remembered[name.label] = name
        while len(self._remembered) > MAX_REMEMBERED:
            oldest = self._remembered.pop(next(iter(self._remembered)))
            self._forgotten_version = max(self._forgotten_version, oldest.last_version)

    def not_found(self, name: str) -> AdapterNotFound:
        """Make the error for a name that is not registered."""
        known = ", ".join(islice(self.current, 20)) or "none"
        more = f" and {len(self.current) - 20} more" if len(self.current) > 20 else ""
        text = "not registered; load it with load_adapter or register_adapter"
        return AdapterNotFound(f"{text} (known: {known}{more})", name=name)

    def know(self, entry: AdapterEntry, name: str) -> None:
        """Let policies know a version by a name."""
        entry.name = name
        self.known[name], self.views[name] = entry, entry.view

    def forget(self, entry: AdapterEntry) -> None:
        """Note that policies do not know a version any more."""
        del self.known[entry.name], self.views[entry.name]

    def forget_want(self, entry: AdapterEntry) -> None:
        """Note that no caller waits any more for a version to be read."""
        entry.wanted_since = None
        self.wanted.pop(entry.uid, None)
