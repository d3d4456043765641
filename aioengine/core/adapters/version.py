"""The states of an adapter's version, and the only changes of them.

Where it is:

              read             arrive            copy             place
    ON_DISK --------> LOADING --------> ON_CPU --------> COPYING -------> IN_SLOT
       ^               |   | stall        ^  | drop        | cancel         | evict
       |    give up    |   v     arrive   |  v             v                v
       +---------------+- STALLED --------+  ON_DISK     ON_CPU           ON_CPU

A read is given up if it fails or is cancelled. One that stalls goes on, and others may begin meanwhile.

What it is for new requests:

    NEW --publish--> CURRENT --retire--> RETIRED --free--> FREED
      \\--retire--> RETIRED

A retired version only finishes the requests that were accepted for it. It is freed when it is on disk alone,
and nobody needs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType
from typing import Literal

from aioengine.schedulers.policy import Location, SlotState


class State(Enum):
    """Where a version is; the value says how policies see that."""

    ON_DISK = "on disk", Location.DISK
    LOADING = "being read", Location.LOADING
    STALLED = "being read, without progress", Location.LOADING
    ON_CPU = "in the CPU cache", Location.CPU
    COPYING = "being copied into a slot", Location.CPU
    IN_SLOT = "in a slot", Location.SLOT


class Life(Enum):
    """What a version is for new requests."""

    NEW = "not published yet"
    CURRENT = "current"
    RETIRED = "retired"
    FREED = "freed"


Change = (
    Literal["read", "stall", "arrive", "give up", "drop", "copy", "place", "cancel", "evict"]
    | Literal["publish", "retire", "free"]
)
"""What may happen to a version."""

STATES: Mapping[Change, Mapping[State, State]] = MappingProxyType(
    {
        "read": {State.ON_DISK: State.LOADING},
        "stall": {State.LOADING: State.STALLED},
        "arrive": {State.LOADING: State.ON_CPU, State.STALLED: State.ON_CPU},
        "give up": {State.LOADING: State.ON_DISK, State.STALLED: State.ON_DISK},
        "drop": {State.ON_CPU: State.ON_DISK},
        "copy": {State.ON_CPU: State.COPYING},
        "place": {State.COPYING: State.IN_SLOT},
        "cancel": {State.COPYING: State.ON_CPU},
        "evict": {State.IN_SLOT: State.ON_CPU},
    }
)
"""The state after each change of where a version is, by the state before."""

LIVES: Mapping[Change, Mapping[Life, Life]] = MappingProxyType(
    {
        "publish": {Life.NEW: Life.CURRENT},
        "retire": {Life.NEW: Life.RETIRED, Life.CURRENT: Life.RETIRED},
        "free": {Life.RETIRED: Life.FREED},
    }
)
"""The same of what it is for new requests."""


class ChangeNotAllowed(Exception):
    """A change that a version's state does not allow. It is a fault of the caller, and nothing has
    changed."""


@dataclass(slots=True, eq=False)
class Version:
    """The state of an adapter's version. Only :meth:`change` changes it."""

    state: State = field(init=False, default=State.ON_DISK)
    life: Life = field(init=False, default=Life.NEW)
    location: Location = field(init=False, default=Location.DISK)
    slot_state: SlotState = field(init=False, default=SlotState.FREE)
    """The state of its slot; FREE if it has none."""
    published: bool = field(init=False, default=False)
    """Whether it is or was the current version; only then policies know it."""

    def change(self, what: Change) -> None:
        """Carry out a change. Raises ChangeNotAllowed, with the reason, if the state does not allow it."""
        life = LIVES[what].get(self.life) if what in LIVES else self.life
        state = STATES[what].get(self.state) if what in STATES else self.state
        freed = self.life is Life.FREED
        if life is None or state is None or freed or (life is Life.FREED and state is not State.ON_DISK):
            where, _ = self.state.value
            raise ChangeNotAllowed(f"{what}: a version that is {where} and {self.life.value} must not")
        self.life, self.state, (_, self.location) = life, state, state.value
        self.slot_state = SlotState.LOADING if state is State.COPYING else SlotState.FREE
        if state is State.IN_SLOT:
            self.slot_state = SlotState.DRAINING if self.retired else SlotState.READY
        self.published = self.published or life is Life.CURRENT

    @property
    def stalled(self) -> bool:
        """Whether its read makes no progress. Then it counts neither as a load nor in the CPU cache."""
        return self.state is State.STALLED

    @property
    def retired(self) -> bool:
        """Whether it is unloaded or replaced: it accepts no new requests, and is freed when the accepted ones
        have ended."""
        return self.life is Life.RETIRED or self.life is Life.FREED
