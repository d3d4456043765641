"""A change of an adapter, which all replicas make, or none, and their answers to it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from aioengine.errors import AioEngineError, EngineStopped
from aioengine.fleet.gateway.members import Member
from aioengine.fleet.registry import Entry
from aioengine.info import AdapterInfo


class Change:
    """A change of an adapter that a gateway makes, on these replicas. ``known``: what the registry has."""

    def __init__(self, gateway: str, name: str, members: Sequence[Member], known: Entry | None) -> None:
        self.name = name
        self.members = members
        self.known = known
        self.id = 0 if known is None else known.version, gateway
        """Of two changes of one version that replicas prepare, the one whose gateway's name is higher goes
        on."""
        self.pins = False
        """Whether replicas have begun to pin it."""

    @property
    def version(self) -> int:
        """The current version; 0: the adapter has none in the fleet."""
        return 0 if self.known is None else self.known.number


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
    raise_first(answers)
    for answer in answers:
        if isinstance(answer, AdapterInfo):
            return answer
    raise EngineStopped("the replicas that were asked are lost; try again later")


def raise_first(answers: Sequence[Any]) -> None:
    """Raise the first error among the answers, if there is one."""
    for answer in answers:
        if isinstance(answer, AioEngineError):
            raise answer
