"""Asks replicas to do something with an adapter: all of them do it, or none."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import msgspec

from aioengine.errors import AdapterConflict, AioEngineError, EngineStopped
from aioengine.fleet.gateway.members import Member, Members
from aioengine.info import AdapterInfo

logger = logging.getLogger("aioengine.fleet")

UNDO_SECONDS = 5.0
"""How long a change that has failed waits for the replicas to undo it. They go on with that."""


class Change(NamedTuple):
    """A change of an adapter, while no other gateway changes it."""

    members: Sequence[Member]
    name: str
    """Its name among all changes of the fleet."""
    lost: Callable[[], bool]
    """Function that returns whether another gateway may change the adapter, because this one did not renew
    its right in time."""


class Replicas:
    """Calls to replicas, by ``EngineReplica.adapter``. Their answers have each replica's own version
    numbers."""

    def __init__(self, members: Members) -> None:
        self._members = members

    async def ask(self, member: Member, action: str, **arguments: Any) -> Any:
        """Return a replica's answer, or the error that it met; None if the replica is lost: when it is back,
        it gets what the registry has."""
        call = self._members.handle.options(method_name="adapter")
        try:
            return await call.remote(action, arguments, to=member.channel.replica)
        except AioEngineError:
            raise
        except Exception as error:
            logger.warning("replica %s did not %s: %s", member.channel.replica, action, type(error).__name__)
            return None

    async def ask_all(self, members: Sequence[Member], action: str, **arguments: Any) -> list[Any]:
        return list(await asyncio.gather(*[self.ask(member, action, **arguments) for member in members]))

    async def labels(self, adapter: str, content: str, members: Sequence[Member]) -> int:
        """Return the labels of the head of an adapter with this content ("": any), as one of these replicas
        has read it, or else from one that lives, which reads it. Raises that replica's error, or
        EngineStopped."""
        for info in (info for member in members for info in member.residency.versions):
            if info.name == adapter and info.bytes and content in ("", info.digest):
                return info.labels
        for member in by_load(members):
            found = await self.ask(member, "labels", name=adapter, content=content)
            if isinstance(found, int):
                return found
            if found is not None:
                raise found
        raise EngineStopped("no replica of the fleet answers now; try again later")

    @asynccontextmanager
    async def or_undone(
        self, members: Sequence[Member], action: str, **arguments: Any
    ) -> AsyncIterator[None]:
        """If the block fails, have these replicas do ``action``, which undoes it."""

        async def undo() -> None:
            asks = [self.ask(member, action, **arguments) for member in members]
            await asyncio.gather(*asks, return_exceptions=True)

        try:
            yield
        except BaseException:
            await asyncio.wait([self._members.spawn(undo())], timeout=UNDO_SECONDS)
            raise

    async def prepare(self, name: str, where: str | None, change: Change, also: str | None = None) -> str:
        """Have those that hold the adapter, and ``also``, read it, and the others know where it is. Returns
        the digest of its content. Raises an error if one fails, or has read something else than the
        others."""
        members, what = change.members, {"name": name, "change": change.name, "path": where}
        holders = [m for m in members if holds(name, m) or m.channel.replica == also] or members[:1]
        others = [member for member in members if member not in holders]
        answers = await self.ask_all(holders, "prepare", **what)
        _raise_first(answers)
        read = {
            holder.channel.replica: answer.digest
            for holder, answer in zip(holders, answers, strict=True)
            if isinstance(answer, AdapterInfo)
        }
        if len(set(read.values())) > 1:
            found = ", ".join(f"{digest[:12]}... on {replica}" for replica, digest in read.items())
            raise AdapterConflict(
                f"its files are not the same on all nodes (SHA-256 {found}); no replica takes them",
                name=name,
                path=where,
            )
        _raise_first(await self.ask_all(others, "prepare", **what, read=False))
        if not read:
            raise EngineStopped("the replicas that were asked are lost; try again later")
        return next(iter(read.values()))

    async def commit(self, name: str, change: Change, digest: str, version: int | None) -> AdapterInfo:
        """Let new requests use what was prepared, which is the fleet's ``version``."""
        what = {"name": name, "change": change.name, "version": version, "digest": digest}
        answers = await self.ask_all(change.members, "commit", **what)
        found = first_of(answers)  # who has not read it does not know what it is like
        found = next((a for a in answers if isinstance(a, AdapterInfo) and a.digest == digest), found)
        return msgspec.structs.replace(found, digest=digest)

    async def pin(self, name: str, members: Sequence[Member], force: bool) -> AdapterInfo:
        """Pin the adapter on all or on none."""
        before = {
            member.channel.replica
            for member in members
            if any(info.name == name and info.pinned for info in member.residency.adapters)
        }
        fresh = [member for member in members if member.channel.replica not in before]
        async with self.or_undone(fresh, "unpin", name=name):
            return first_of(await self.ask_all(members, "pin", name=name, force=force))


def by_load(members: Iterable[Member]) -> list[Member]:
    """Sort replicas, so that what one of them has to do is done soon: first those that do not drain, then by
    the age of the running step, which is large where the model hangs, and by requests."""

    def key(member: Member) -> tuple[bool, float, int]:
        status = member.status
        if status is None:
            return True, 0.0, 0
        return status.draining, round(status.step_age), status.report.waiting + status.report.running

    return sorted(members, key=key)


def holds(name: str, member: Member) -> bool:
    """Return whether a replica has an adapter in memory."""
    return any(info.name == name for info in member.residency.adapters)


def first_of(answers: Sequence[Any]) -> AdapterInfo:
    """Return the first answer of a replica that lives. Raises the first error instead, if there is one."""
    _raise_first(answers)
    for answer in answers:
        if isinstance(answer, AdapterInfo):
            return answer
    raise EngineStopped("the replicas that were asked are lost; try again later")


def _raise_first(answers: Sequence[Any]) -> None:
    """Raise the first error among the answers, if there is one."""
    for answer in answers:
        if isinstance(answer, AioEngineError):
            raise answer
