"""Adapters of a fleet: what is done to one is done on every replica, or on none."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import msgspec

from aioengine.adapters.resolvers.sources import check_same_path, checked_path
from aioengine.errors import (
    AdapterConflict,
    AdapterError,
    AdapterInvalid,
    AdapterLoadError,
    AdapterNotFound,
    AioEngineError,
    ConfigError,
    EngineStopped,
)
from aioengine.fleet.config import FleetConfig, is_utf8
from aioengine.fleet.gateway.changes import Change, by_load, first_of, holds, raise_first
from aioengine.fleet.gateway.entries import KnownEntries, listed, source_of
from aioengine.fleet.gateway.members import Member, Members
from aioengine.fleet.registry import Entry, answer_of
from aioengine.fleet.uploads import Uploads
from aioengine.fleet.wire import Residency, gone
from aioengine.info import AdapterInfo, is_mix
from aioengine.request import Wanted
from aioengine.runtime.requests.vectors import scaled_adapter
from aioengine.schedulers.routing import Move, PlacementGuard, load_placement
from aioengine.step import BytesLike
from aioengine.tasks import Background, run_to_completion

logger = logging.getLogger("aioengine.fleet")

T = TypeVar("T")

ANSWER_SECONDS = 30.0
"""How long the registry's answer to a change may take."""
SYNC_SECONDS = 60.0
"""Longest time until a replica knows the fleet's adapters; after that it gets requests nevertheless."""
MAX_EARLIER = 16
"""Replaced versions of an adapter that requests may name."""
MEND_SECONDS = 10.0
"""Between two attempts to have replicas agree on an adapter."""
UNDO_SECONDS = 5.0
"""How long a change that has failed waits for the replicas to undo it. They go on with that."""
SETTLE_SECONDS = 1.0
"""After a change, until all replicas have said what they hold."""


class FleetAdapters:
    """Operations on a fleet's adapters, as one gateway makes them: on all replicas, and in the registry. They
    are those of ``AsyncEngine``, for the whole fleet."""

    def __init__(self, config: FleetConfig, members: Members) -> None:
        self.fleet_config = config
        self.members = members
        self.known = KnownEntries(config.adapters, members.state)
        self.registry: Any = None
        self._uploads = Uploads(config.registry, self._sources)
        self.known.in_use = self._uploads.in_use
        self._mended: dict[str, float] = {}
        """When replicas were last made to agree on an adapter that one of them had found changed."""
        self._locks = WeakValueDictionary[str, asyncio.Lock]()
        """Of adapters that this gateway changes."""
        self._background = Background()
        self._placement = PlacementGuard(
            load_placement(config.placement),
            failed=lambda kind, text: logger.warning("placement: %s", text),
        )

    async def start_adapters(self, registry: Any) -> None:
        """``registry``: handle of its actor. Raises ConfigError if its checkpoint cannot be read."""
        self.registry = registry
        await self.known.refresh(self.registry)
        self.members.on_join.append(self._joined)
        self.members.on_residency.append(self._compare)
        self.members.on_changed = self._changed
        for member in list(self.members.members.values()):
            await self._sync(member)
        if self.fleet_config.placement != "none":
            self._background.spawn(self._plan())

    async def stop_adapters(self) -> None:
        await self._background.end()
        await self._uploads.stop()

    def _check_lora(self) -> None:
        """Raise an error if the fleet has no adapters."""
        if self.fleet_config.engine.lora is None:
            raise ConfigError("lora=None: this fleet was configured without adapters")

    def adapters(self) -> list[AdapterInfo]:
        """Return every registered adapter, with the fastest place that holds it."""
        held = (info for member in self.members.members.values() for info in member.residency.adapters)
        return listed(self.known.by_name, held)

    def find_adapter(self, name: str) -> AdapterInfo | None:
        """Return one registered adapter; None if there is none of that name."""
        known, members = self.known.by_name.get(name), self.members.members.values()
        held = (info for member in members for info in member.residency.adapters if info.name == name)
        return next(iter(listed({} if known is None else {name: known}, held)), None)

    def count_adapters(self) -> int:
        """Return the number of adapters that the fleet knows."""
        return len(self.known.by_name)

    def _sources(self) -> set[str]:
        """Return the folders and URLs that replicas load adapters from, also those of replaced versions. A
        replica only knows its local copy of a URL, so the entries count, whatever it holds."""
        members = self.members.members.values()
        held = {info.path for member in members for info in member.residency.versions}
        return held | {entry.path for entry in self.known.by_name.values()}

    async def content(self, adapter: str) -> str:
        """See :meth:`KnownEntries.content`."""
        return await self.known.content(adapter, self.registry)

    async def head_labels(self, adapter: Wanted) -> int:
        """Return how many labels the head of an adapter, or of a version ("sql@2"), has; 0 without one, as
        for a mix. One replica reads it if none has. Raises AdapterNotFound, or what reading it raises."""
        wanted = scaled_adapter(adapter)
        if wanted is None:
            return 0
        self._check_lora()
        name, _, number = wanted.partition("@")
        content = await self.content(wanted) if number else self.known.digest(name)
        members = self.members.members.values()
        for info in (info for member in members for info in member.residency.versions):
            if info.name == name and info.bytes and content in ("", info.digest):
                return info.labels
        if content != self.known.digest(name):
            raise gone(wanted)
        for member in by_load(members):
            found = await self.members.ask(member, "load", name=name)
            if found is not None:
                return first_of([found]).labels
        raise EngineStopped("no replica of the fleet answers now; try again later")

    async def load_adapter(
        self,
        name: str,
        path: str | os.PathLike[str] | None = None,
        *,
        pin: bool = False,
        replace: bool = False,
    ) -> AdapterInfo:
        """Have every replica know it. One reads and validates it now, all that hold it if it is replaced.

        A replacement happens everywhere or nowhere: all replicas that hold the adapter read the new version,
        and only when each has the same content do new requests get it; when this returns, no replica admits
        the old one. If one fails, or reads something else, the old one stays everywhere, and an error is
        raised. A replica that reads it later accepts no other content."""
        self._check_lora()
        where = None if path is None else os.fspath(path)
        if where is not None and not is_utf8(where):
            raise AdapterInvalid("its path is no UTF-8; rename the folder", name=name, path=ascii(where))
        async with self.changing(name) as change:
            return await self._load(change, where, pin=pin, replace=replace)

    async def load_adapter_files(
        self, name: str, config: bytes, weights: BytesLike, *, pin: bool = False, replace: bool = False
    ) -> AdapterInfo:
        """Write an adapter's files below the registry's folder, where every replica can read them, and load
        it from there. Raises ConfigError if the fleet has no registry, and what :meth:`load_adapter`
        raises."""
        self._check_lora()
        async with self.changing(name) as change, self._uploads.stored(name, config, weights) as folder:
            return await self._load(change, folder, pin=pin, replace=replace)

    async def unload_adapter(self, name: str, *, force: bool = False) -> None:
        """Unload it from every replica, once the requests on it have ended; new ones are refused at once. If
        the call is cancelled, that goes on. Raises AdapterNotFound if no replica knows it."""
        self._check_lora()
        async with self.changing(name) as change:
            known, ended = change.known, False
            what = {"name": name, "version": 0 if known is None else known.version}
            try:
                await run_to_completion(self._store(change, None))
                answers = await self.members.ask_all(change.members, "unload", **what, force=force)
                ended = True
            finally:
                if not ended and change.known is None:
                    await run_to_completion(self.members.ask_all(change.members, "forget", **what))
            errors = [answer for answer in answers if isinstance(answer, AioEngineError)]
            others = [error for error in errors if not isinstance(error, AdapterNotFound)]
            if others:
                raise others[0]
            if errors and len(errors) == len(answers) and known is None:
                raise errors[0]

    async def pin_adapter(self, name: str, *, force: bool = False) -> AdapterInfo:
        """Pin an adapter on every replica, or on none."""
        self._check_lora()
        async with self.changing(name) as change:
            return await self._pin(change, force)

    async def unpin_adapter(self, name: str) -> AdapterInfo:
        self._check_lora()
        async with self.changing(name) as change:
            answers = await self.members.ask_all(change.members, "unpin", name=name)
            return await self._note(change, first_of(answers), version=change.version or 1, pinned=False)

    # Steps

    async def _load(self, change: Change, where: str | None, *, pin: bool, replace: bool) -> AdapterInfo:
        name, known = change.name, change.known
        if replace and (known is not None or where is not None):
            info = await self._replace(change, where)
        else:
            if where is not None and known is not None:
                # A replica that was never told of it would take these files under the same version.
                check_same_path(name, checked_path(name, known.path), checked_path(name, where))
                where = None
            info = await self._add(change, where)
        return await self._pin(change, False, where) if pin else info

    async def _add(self, change: Change, where: str | None) -> AdapterInfo:
        """Have one replica read it. If nobody had loaded it, all get what that one has read, as a version."""
        name, known = change.name, change.known
        holders = [member for member in change.members if holds(name, member)]
        if known is None and not holders and where is not None:
            return await self._replace(change, where)
        first = (holders or change.members)[0]
        info = first_of([await self.members.ask(first, "load", name=name, path=where)])
        if known is None or self._contents(name) - {info.digest}:
            return await self._replace(change, source_of(where, known, info), first.channel.replica)
        return await self._note(change, info, where, version=change.version)

    async def _replace(
        self, change: Change, where: str | None, also: str | None = None, *, new: bool = True
    ) -> AdapterInfo:
        """Have those that hold it, and ``also``, read it, compare what they have read, and all take it, even
        if the call is cancelled meanwhile. ``new``: it gets the next version of the fleet."""
        info = await self._prepare(change, where, also)
        return await self._note(change, info, where, version=change.version + 1 if new else 0)

    async def _prepare(self, change: Change, where: str | None, also: str | None = None) -> AdapterInfo:
        """Have those that hold the adapter, and ``also``, read it, and the others know where it is. Returns
        what was read. Raises an error if one fails, or has read something else than the others."""
        name, members = change.name, change.members
        what = {"name": name, "change": change.id, "path": where}
        holders = [m for m in members if holds(name, m) or m.channel.replica == also] or members[:1]
        answers = await self.members.ask_all(holders, "prepare", **what)
        info = first_of(answers)
        read = [(answer, h) for answer, h in zip(answers, holders, strict=True) if answer is not None]
        if any(answer.digest != info.digest for answer, _ in read):
            found = ", ".join(f"{answer.digest[:12]}... on {h.channel.replica}" for answer, h in read)
            raise AdapterConflict(
                f"its files are not the same on all nodes (SHA-256 {found}); no replica takes them",
                name=name,
                path=where,
            )
        others = [member for member in members if member not in holders]
        raise_first(await self.members.ask_all(others, "prepare", **what, read=False))
        return info

    async def _pin(self, change: Change, force: bool, where: str | None = None) -> AdapterInfo:
        """Pin it on all or on none."""
        change.pins = True
        info = first_of(await self.members.ask_all(change.members, "pin", name=change.name, force=force))
        return await self._note(change, info, where, version=change.version or 1, pinned=True)

    async def _note(
        self,
        change: Change,
        info: AdapterInfo,
        where: str | None = None,
        *,
        version: int,
        pinned: bool | None = None,
    ) -> AdapterInfo:
        """Store an adapter as replicas have it now, and have all replicas know it. ``where``: the source that
        was given for it, if any; ``pinned`` None: as it was. With ``version`` 0 it concerns only the change's
        replicas."""
        known = change.known
        digest = info.digest or ("" if known is None else known.digest)
        stays = known is not None and known.pinned if pinned is None else pinned
        source, earlier = source_of(where, known, info), self._earlier(change, info, version)
        entry = Entry(info.name, source, version, digest, stays, earlier)
        entry = await run_to_completion(self._put(change, entry))
        return msgspec.structs.replace(info, version=entry.version, pinned=stays)

    def _earlier(self, change: Change, info: AdapterInfo, version: int) -> dict[int, str]:
        """Return the digests of the versions before this one."""
        known = change.known
        if known is None or version == change.version:
            return {} if known is None else known.earlier
        there = (i for m in self.members.members.values() for i in m.residency.versions)
        read = (i.digest for i in there if i.name == info.name and i.digest not in ("", info.digest))
        was = known.digest or next(read, "")  # "": nobody has read it
        earlier = {**known.earlier, change.version: was} if was else known.earlier
        return dict(sorted(earlier.items())[-MAX_EARLIER:])

    async def _put(self, change: Change, entry: Entry) -> Entry:
        """Store an entry, and have all replicas know it, also those that have come since the change began."""
        members = change.members
        if entry.version:
            entry = await self._store(change, entry) or entry
            members = list(self.members.members.values())
        await self.members.ask_all(members, "sync", entries=[entry], change=change.id)
        return entry

    async def _store(self, change: Change, after: Entry | None) -> Entry | None:
        """Put an entry in place of what there was, and return it. Raises AdapterLoadError if there is another
        one now."""
        name, before = change.name, change.known
        if before is not None and not before.version:
            before = None  # it is only in the configuration
        if before is None and after is None:
            self.known.remove(name)
        else:
            taken, after = await self._registry(name, self.registry.change.remote(name, before, after))
            if not taken:
                why = "another gateway has changed it meanwhile; repeat the change"
                raise AdapterLoadError(why, name=name, transient=True)
            await self.known.refresh_in_time(self.registry)  # others may have changed it again
        change.known = after
        return after

    async def _registry(self, name: str, call: Awaitable[T]) -> T:
        """Await the registry's answer. Raises AdapterLoadError if its checkpoint fails, or if it hangs: Ray
        does not start it again."""
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                return await answer_of(call)
        except TimeoutError:
            why = f"the fleet's registry has not answered for {ANSWER_SECONDS:g} s; repeat the change"
        except ConfigError as error:
            why = f"nothing is changed, because the fleet's registry fails: {error}"
        raise AdapterLoadError(why, name=name, transient=True)

    @asynccontextmanager
    async def changing(self, name: str) -> AsyncIterator[Change]:
        """Let this gateway make one change of an adapter at a time, of what the registry has now; if another
        one makes one meanwhile, the registry takes the first. Raises EngineStopped if there is no replica."""
        async with self._locks.setdefault(name, asyncio.Lock()):
            await self._registry(name, self.known.refresh(self.registry))
            members = by_load(self.members.members.values())
            if not members:
                raise EngineStopped("the fleet has no replica now; try again later")
            change = Change(self.members.gateway, name, members, self.known.by_name.get(name))
            try:
                yield change
            except BaseException:
                undoing = self.members.background.spawn(self._undo(change))
                await asyncio.wait([undoing], timeout=UNDO_SECONDS)
                raise

    async def _undo(self, change: Change) -> None:
        """Have the replicas drop what they have prepared for a change, and be as the registry has it."""
        await self.known.refresh_in_time(self.registry)
        entry = self.known.by_name.get(change.name)
        unpin = change.pins and not (entry is not None and entry.pinned)
        what = {"name": change.name, "change": change.id, "entry": entry, "unpin": unpin}
        await self.members.ask_all(change.members, "settle", **what)

    # Replicas that come, and plans

    def _joined(self, member: Member) -> None:
        member.ready = False
        self._background.spawn(self._sync(member))

    async def _sync(self, member: Member) -> None:
        member.ready, replica = False, member.channel.replica
        whole = await self.known.refresh_in_time(self.registry)
        entries = [entry for entry in self.known.by_name.values() if entry.version > 0]
        telling = self._background.spawn(self._tell(member, entries, whole))
        _, late = await asyncio.wait([telling], timeout=SYNC_SECONDS)
        if late:
            logger.warning("replica %s has not taken all adapters within %g s", replica, SYNC_SECONDS)
        self.members.knows_adapters(member)

    async def _tell(self, member: Member, entries: list[Entry], whole: bool) -> None:
        others = await self.members.ask(member, "sync", entries=entries, whole=whole)
        if isinstance(others, Exception):
            logger.warning("replica %s: %s", member.channel.replica, others)
        # What it knows besides was in the registry before, maybe only since this gateway has asked that.
        elif others and await self.known.refresh_in_time(self.registry):
            for name in others.keys() - self.known.by_name:
                await self.members.ask(member, "forget", name=name, version=others[name])

    async def _plan(self) -> None:
        loop = asyncio.get_running_loop()
        state = self.members.state
        while True:
            await asyncio.sleep(self.fleet_config.placement_seconds)
            view = state.snapshot()
            moves = await loop.run_in_executor(None, self._placement.plan, view)
            if moves is None:
                continue
            moves = [move for move in moves if move.kind == "unload" or self._exists(move.adapter)]
            state.planned(view, moves)
            for move in moves:
                await self._move(move)

    def _exists(self, name: str) -> bool:
        """Whether a plan may have an adapter loaded: clients make up any name, and requests make mixes."""
        held = any(holds(name, member) for member in self.members.members.values())
        return name in self.known.by_name or (held and not is_mix(name))

    async def _move(self, move: Move) -> None:
        """ "unload" is left to the CPU cache, which lets go of what is used least."""
        member = self.members.members.get(move.replica)
        if member is None or move.kind == "unload":
            return
        answer = await self.members.ask(member, move.kind, name=move.adapter)
        if isinstance(answer, (AdapterError, ConfigError)):
            logger.warning("placement: %s on %s: %s", move.kind, move.replica, answer)

    # Content that differs

    def _compare(self, member: Member, before: Residency) -> None:
        """Find adapters that a replica has read, and of which another one holds other content. A replica
        reads an adapter's files when a request first needs it there; they may have been changed meanwhile,
        without telling the fleet."""
        held = {info.name: info.digest for info in before.adapters}
        for info in member.residency.adapters:
            if info.digest != held.get(info.name, "") and len(self._contents(info.name)) > 1:
                self._background.spawn(self._agree(info.name))

    def _contents(self, name: str) -> set[str]:
        """Return the digests of an adapter, over the replicas that have read it; without those of replaced
        versions, and of mixes, whose parts are compared."""
        known, members = self.known.by_name.get(name), self.members.members.values()
        infos = (info for member in members for info in member.residency.adapters if info.name == name)
        found = {info.digest for info in infos if info.digest and not is_mix(name)}
        return {digest for digest in found if known is None or not known.was(digest)}

    def _changed(self, replica: str, name: str) -> None:
        """A replica has refused what it read: that one and all holders read the adapter again."""
        now = asyncio.get_running_loop().time()
        if now >= self._mended.get(name, -MEND_SECONDS) + MEND_SECONDS:
            self._mended = {name: now} | {n: at for n, at in self._mended.items() if now < at + MEND_SECONDS}
            self._background.spawn(self._agree(name, replica))

    async def _agree(self, name: str, refused: str | None = None) -> None:
        """Have all holders read the adapter again, so that they have what is there now: all, or none.
        ``refused``: a replica that has no version of it, because what it read was not what it should be."""
        try:
            async with self.changing(name) as change:
                if refused is None:
                    await asyncio.sleep(SETTLE_SECONDS)  # it may have been the middle of a replacement
                    if len(self._contents(name)) < 2:
                        return
                self.members.conflicts += 1
                path = None if change.known is None else change.known.path
                if path is None:  # found by its name; nobody else has to know it
                    some = [m for m in change.members if holds(name, m) or m.channel.replica == refused]
                    change.members = some
                logger.warning("adapter %r does not have the same content everywhere; it is read again", name)
                await self._replace(change, path, refused, new=path is not None)
        except EngineStopped:
            pass  # no replica is left
        except AioEngineError as error:
            logger.error("adapter %r stays different between replicas: %s", name, error)
