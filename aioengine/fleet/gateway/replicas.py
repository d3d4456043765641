"""Asks replicas to do something with an adapter: all of them do it, or none."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from aioengine.errors import AdapterConflict, AioEngineError, EngineStopped
from aioengine.fleet.gateway.members import Member, Members
from aioengine.fleet.registry import Entry
from aioengine.info import AdapterInfo

logger = logging.getLogger("aioengine.fleet")

UNDO_SECONDS = 5.0
"""How long a change that has failed waits for the replicas to undo it. They go on with that."""


class Change:
    """A change of an adapter that a gateway makes, on these replicas. ``known``: what the registry has."""

    def __init__(self, gateway: str, name: str, members: Sequence[Member], known: Entry | None) -> None:
        self.name = name
        self.members = members
        self.known = known
        self.id = 0 if known is None else known.version, gateway
        """Of two changes of one version that replicas prepare, the one whose gateway's name is higher goes
        on."""
        self.failed = False
        """Whether the registry has not taken it, whatever replicas have done already."""

    @property
    def version(self) -> int:
        """The current version; 0: the adapter has none in the fleet."""
        return 0 if self.known is None else self.known.number


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
        except Exception as error:
            logger.warning("replica %s did not %s: %s", member.channel.replica, action, type(error).__name__)
            return None

    async def ask_all(self, members: Sequence[Member], action: str, **arguments: Any) -> list[Any]:
        return list(await asyncio.gather(*[self.ask(member, action, **arguments) for member in members]))

    @asynccontextmanager
    async def or_undone(
        self, members: Sequence[Member], action: str, **arguments: Any
    ) -> AsyncIterator[None]:
        """If the block fails, have these replicas do ``action``, which undoes it."""
        try:
            yield
        except BaseException:
            undoing = self._members.background.spawn(self.ask_all(members, action, **arguments))
            await asyncio.wait([undoing], timeout=UNDO_SECONDS)
            raise

    async def prepare(self, change: Change, where: str | None, also: str | None = None) -> AdapterInfo:
        """Have those that hold the adapter, and ``also``, read it, and the others know where it is. Returns
        what was read. Raises an error if one fails, or has read something else than the others."""
        name, members = change.name, change.members
        what = {"name": name, "change": change.id, "path": where}
        holders = [m for m in members if holds(name, m) or m.channel.replica == also] or members[:1]
        answers = await self.ask_all(holders, "prepare", **what)
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
        _raise_first(await self.ask_all(others, "prepare", **what, read=False))
        return info


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
