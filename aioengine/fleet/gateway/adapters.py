"""Adapters of a fleet: what is done to one is done on every replica, or on none."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Coroutine, Sequence
from contextlib import asynccontextmanager
from itertools import count
from typing import Any, TypeVar

from aioengine.adapters.resolvers.sources import check_same_path, checked_path
from aioengine.errors import (
    AdapterError,
    AdapterInvalid,
    AdapterLoadError,
    AdapterNotFound,
    AioEngineError,
    ConfigError,
    EngineStopped,
)
from aioengine.fleet.config import FleetConfig, is_utf8
from aioengine.fleet.gateway.entries import KnownEntries, listed, numbered, source_of, version_of
from aioengine.fleet.gateway.members import Member, Members
from aioengine.fleet.gateway.replicas import Change, Replicas, by_load, first_of, holds
from aioengine.fleet.registry import Entry, answer_of, lease
from aioengine.fleet.uploads import Uploads
from aioengine.fleet.versions import gone
from aioengine.fleet.wire import Residency
from aioengine.info import AdapterInfo, is_mix
from aioengine.request import Wanted
from aioengine.runtime.requests.vectors import scaled_adapter
from aioengine.schedulers.routing import Move, PlacementGuard, load_placement
from aioengine.step import BytesLike
from aioengine.tasks import end_tasks, run_to_completion

logger = logging.getLogger("aioengine.fleet")

T = TypeVar("T")

_FAILS = "nothing is changed, because the fleet's registry fails"
_UNSAVED = (
    "the replicas have made the change, but it would be lost with Ray's head; repair this, and repeat it"
)
SYNC_SECONDS = 60.0
"""Longest time until a replica knows the fleet's adapters; after that it gets requests nevertheless."""
MAX_EARLIER = 16
"""Replaced versions of an adapter that requests may name."""
MEND_SECONDS = 10.0
"""Between two attempts to have replicas agree on an adapter."""
SETTLE_SECONDS = 1.0
"""After a change, until all replicas have said what they hold."""


class FleetAdapters:
    """Operations on a fleet's adapters, as one gateway makes them: on all replicas, and in the registry. They
    are those of ``AsyncEngine``, for the whole fleet."""

    def __init__(self, config: FleetConfig, members: Members) -> None:
        self.fleet_config = config
        self.members = members
        self._replicas = Replicas(members)
        self.known = KnownEntries(config.adapters, members.state)
        self.registry: Any = None
        self._uploads = Uploads(config.registry, self.changing, self._sources)
        self.known.in_use = self._uploads.in_use
        self._mended: dict[str, float] = {}
        """When replicas were last made to agree on an adapter that one of them had found changed."""
        self._owners = count()
        """Numbers of the changes that this gateway makes."""
        self._tasks: set[asyncio.Task[object]] = set()
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
            self._spawn(self._plan())

    async def stop_adapters(self) -> None:
        await end_tasks(self._tasks)
        await self._uploads.stop()

    def _check_lora(self) -> None:
        """Raise an error if the fleet has no adapters."""
        if self.fleet_config.engine.lora is None:
            raise ConfigError("lora=None: this fleet was configured without adapters")

    def adapters(self) -> list[AdapterInfo]:
        """Return every registered adapter, with the fastest place that holds it."""
        held = (info for member in self.members.members.values() for info in member.residency.adapters)
        return listed(self.known.by_name.values(), held, self.known.described)

    def find_adapter(self, name: str) -> AdapterInfo | None:
        """Return one registered adapter; None if there is none of that name."""
        known, members = self.known.by_name.get(name), self.members.members.values()
        held = (info for member in members for info in member.residency.adapters if info.name == name)
        return next(iter(listed([] if known is None else [known], held)), None)

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
        members = list(self.members.members.values())
        if content != self.known.digest(name):
            there = self.members.with_content(name, content)
            members = [member for member in members if member.channel.replica in there]
            if not members:
                raise gone(wanted)
        return await self._replicas.labels(name, content, members)

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
        async with self._uploads.held(path, name):
            return await self._load(name, path, pin=pin, replace=replace)

    async def load_adapter_files(
        self, name: str, config: bytes, weights: BytesLike, *, pin: bool = False, replace: bool = False
    ) -> AdapterInfo:
        """Write an adapter's files below the registry's folder, where every replica can read them, and load
        it from there. Raises ConfigError if the fleet has no registry, and what :meth:`load_adapter`
        raises."""
        self._check_lora()
        async with self._uploads.stored(name, config, weights) as folder:
            return await self._load(name, folder, pin=pin, replace=replace)

    async def _load(
        self, name: str, path: str | os.PathLike[str] | None, *, pin: bool, replace: bool
    ) -> AdapterInfo:
        where = None if path is None else os.fspath(path)
        if where is not None and not is_utf8(where):
            raise AdapterInvalid("its path is no UTF-8; rename the folder", name=name, path=ascii(where))
        async with self.changing(name) as change:
            known = self.known.by_name.get(name)
            if replace and (known is not None or where is not None):
                info = await self._replace(name, where, change)
            else:
                if where is not None and known is not None:
                    # A replica that was never told of it would take these files under the same version.
                    check_same_path(name, checked_path(name, known.path), checked_path(name, where))
                    where = None
                info = await self._add(name, where, known, change)
            if pin:
                info = numbered(await self._replicas.pin(name, change.members, False), info.version)
                info = await self._note(info, change, where, pinned=True)
            return info

    async def unload_adapter(self, name: str, *, force: bool = False) -> None:
        """Unload it from every replica, once the requests on it have ended; new ones are refused at once. If
        the call is cancelled, that goes on. Raises AdapterNotFound if no replica knows it."""
        self._check_lora()
        async with self.changing(name) as change:
            was_known, ended = name in self.known.by_name, False
            try:
                answers = await self._replicas.ask_all(change.members, "unload", name=name, force=force)
                ended = True
            finally:
                if not change.lost():
                    removing = self._remove(name, () if ended else change.members)
                    await run_to_completion(removing, unless=change.lost)
            errors = [answer for answer in answers if isinstance(answer, AioEngineError)]
            others = [error for error in errors if not isinstance(error, AdapterNotFound)]
            if others:
                raise others[0]
            if errors and len(errors) == len(answers) and not was_known:
                raise errors[0]

    async def pin_adapter(self, name: str, *, force: bool = False) -> AdapterInfo:
        """Pin an adapter on every replica, or on none."""
        self._check_lora()
        async with self.changing(name) as change:
            version = await self._version(name)
            info = numbered(await self._replicas.pin(name, change.members, force), version)
            return await self._note(info, change, pinned=True)

    async def unpin_adapter(self, name: str) -> AdapterInfo:
        self._check_lora()
        async with self.changing(name) as change:
            version = await self._version(name)
            answers = await self._replicas.ask_all(change.members, "unpin", name=name)
            info = numbered(first_of(answers), version)
            return await self._note(info, change, pinned=False)

    # Steps

    async def _remove(self, name: str, members: Sequence[Member]) -> None:
        await self._replicas.ask_all(members, "forget", name=name)
        self.known.remove(name)
        await self._registry(name, self.registry.remove.remote(name), _UNSAVED)

    async def _add(self, name: str, where: str | None, known: Entry | None, change: Change) -> AdapterInfo:
        """Have one replica read it. If nobody had loaded it, all get what that one has read, as a version."""
        holders = [member for member in change.members if holds(name, member)]
        if known is None and not holders and where is not None:
            return await self._replace(name, where, change)
        first = (holders or change.members)[0]
        info = first_of([await self._replicas.ask(first, "load", name=name, path=where)])
        if known is None or self._contents(name) - {info.digest}:
            return await self._replace(name, source_of(where, known, info), change, first.channel.replica)
        return await self._note(numbered(info, version_of(known)), change, where)

    async def _replace(
        self,
        name: str,
        where: str | None,
        change: Change,
        also: str | None = None,
        *,
        new: bool = True,
    ) -> AdapterInfo:
        """Have those that hold it, and ``also``, read it, compare what they have read, and flip, all of them
        even if the call is cancelled meanwhile. ``new``: it gets the next version of the fleet."""
        version = await self._next_version(name) if new else None
        # What they have prepared, and what they go on preparing, is dropped if this fails or is cancelled.
        async with self._replicas.or_undone(change.members, "discard", name=name, change=change.name):
            digest = await self._replicas.prepare(name, where, change, also)
            flip = self._flip(name, where, change, digest, version)
            return await run_to_completion(flip, unless=change.lost)

    async def _flip(
        self, name: str, where: str | None, change: Change, digest: str, version: int | None
    ) -> AdapterInfo:
        """Let new requests use what was prepared, and note its version, if it has one."""
        info = await self._replicas.commit(name, change, digest, version)
        if version is None:
            return info
        return await self._note(numbered(info, version), change, where)

    async def _version(self, name: str) -> int:
        """Return the current version; of an adapter that has none in the fleet, the next one."""
        known = self.known.version(name)
        return await self._next_version(name) if known is None else known

    async def _next_version(self, name: str) -> int:
        """Return a number that no content of this adapter has had."""
        call = self.registry.next_version.remote(name, self.known.version(name) or 0)
        return await self._registry(name, call, _FAILS)

    async def _note(
        self, info: AdapterInfo, change: Change, where: str | None = None, *, pinned: bool | None = None
    ) -> AdapterInfo:
        """Store an adapter as replicas have it now. ``where``: the source that was given for it, if any;
        ``pinned`` None: as it was."""
        known = self.known.by_name.get(info.name)
        digest = info.digest or ("" if known is None else known.digest)
        stays = known is not None and known.pinned if pinned is None else pinned
        source, earlier = source_of(where, known, info), self._earlier(known, info)
        entry = Entry(info.name, source, info.version, digest, stays, earlier)
        await run_to_completion(self._put(entry, change), unless=change.lost)
        return info

    def _earlier(self, known: Entry | None, info: AdapterInfo) -> dict[int, str]:
        """Return the digests of the versions before the one that ``info`` describes."""
        if known is None or info.version == version_of(known):
            return {} if known is None else known.earlier
        there = (i for m in self.members.members.values() for i in m.residency.versions)
        read = (i.digest for i in there if i.name == info.name and i.digest not in ("", info.digest))
        was = known.digest or next(read, "")  # "": nobody has read it
        earlier = {**known.earlier, version_of(known): was} if was else known.earlier
        return dict(sorted(earlier.items())[-MAX_EARLIER:])

    async def _put(self, entry: Entry, change: Change) -> None:
        self.known.put(entry)
        try:
            await self._registry(entry.name, self.registry.put.remote(entry), _UNSAVED)
        finally:
            # One may have come meanwhile. What another gateway may have changed is left to that one.
            for member in [] if change.lost() else list(self.members.members.values()):
                await self._replicas.ask(member, "sync", entries=[entry])

    async def _registry(self, name: str, call: Awaitable[T], otherwise: str) -> T:
        """Await the registry's answer. Raises AdapterLoadError, which begins with ``otherwise``, if its
        checkpoint fails."""
        try:
            return await answer_of(call)
        except ConfigError as error:
            raise AdapterLoadError(f"{otherwise}: {error}", name=name, transient=True) from error

    @asynccontextmanager
    async def changing(self, name: str) -> AsyncIterator[Change]:
        """Let one change of an adapter be made at a time, whichever gateway asks for it. Raises EngineStopped
        if there is no replica."""
        owner = f"{self.members.gateway}-{next(self._owners)}"
        async with lease(self.registry, name, owner) as lost:
            await self._registry(name, self.known.refresh(self.registry), _FAILS)
            members = by_load(self.members.members.values())
            if not members:
                raise EngineStopped("the fleet has no replica now; try again later")
            yield Change(members, owner, lost)

    # Replicas that come, and plans

    def _joined(self, member: Member) -> None:
        member.ready = False
        self._spawn(self._sync(member))

    async def _sync(self, member: Member) -> None:
        member.ready, replica = False, member.channel.replica
        whole = await self.known.refresh_in_time(self.registry)
        entries = [entry for entry in self.known.by_name.values() if entry.version > 0]
        telling = self._spawn(self._tell(member, entries, whole))
        _, late = await asyncio.wait([telling], timeout=SYNC_SECONDS)
        if late:
            logger.warning("replica %s has not taken all adapters within %g s", replica, SYNC_SECONDS)
        member.ready = True
        self.members.settle(member)

    async def _tell(self, member: Member, entries: list[Entry], whole: bool) -> None:
        steps = [self._replicas.ask(member, "sync", entries=entries)]
        if whole:
            steps.append(self._forget_others(member, [entry.name for entry in entries]))
        for answer in await asyncio.gather(*steps, return_exceptions=True):
            if isinstance(answer, Exception):
                logger.warning("replica %s: %s", member.channel.replica, answer)

    async def _forget_others(self, member: Member, names: list[str]) -> None:
        """Have a replica forget what the fleet has no more. An adapter may be missing in the registry only
        because another gateway is about to put it there: so each is looked up again while no gateway changes
        it."""
        for name in await self._replicas.ask(member, "others", names=names) or ():
            async with self.changing(name):
                if name not in self.known.by_name:
                    await self._replicas.ask(member, "forget", name=name)

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
        answer = await self._replicas.ask(member, move.kind, name=move.adapter)
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
                self._spawn(self._agree(info.name))

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
            self._spawn(self._agree(name, replica))

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
                known = self.known.by_name.get(name)
                if known is None:  # found by its name; nobody else has to know it
                    some = [m for m in change.members if holds(name, m) or m.channel.replica == refused]
                    change = change._replace(members=some)
                logger.warning("adapter %r does not have the same content everywhere; it is read again", name)
                try:
                    path = None if known is None else known.path
                    await self._replace(name, path, change, refused, new=known is not None)
                except AioEngineError as error:
                    logger.error("adapter %r stays different between replicas: %s", name, error)
        except EngineStopped:
            pass  # no replica is left
        except AdapterLoadError as error:
            logger.error("%s", error)

    def _spawn(self, work: Coroutine[Any, Any, object]) -> asyncio.Task[object]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
