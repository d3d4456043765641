"""Sessions: requests that follow each other, each with what was said before at the beginning of its
prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random
from typing import Annotated

from msgspec import Meta

from aioengine.lab.workload.forms import Form, parse_form
from aioengine.lab.workload.popularity import Alpha, zipf
from aioengine.lab.workload.random_streams import Weighted, exponential, stream
from aioengine.lab.workload.requests import PREFIX_BLOCK, Arrival

MOST_TURNS = 1000
_BLOCKS = 4096
"""Numbers for the blocks of one prompt."""
_SHARED, _SESSION = 2**33, 2**34
"""First numbers of shared beginnings and of sessions; a trace's numbers are below 2**32."""


class Session(Form):
    """Chat: a geometric number of turns of the mean ``turns``. A turn's prompt is all that was said before
    and a new question; it comes an exponential time, of the mean ``think`` seconds, after the answer to the
    one before. With ``branch``, every turn is so many requests at once, with the same history and a question
    each, and the next one follows the first of them: agents that fork."""

    turns: Annotated[float, Meta(ge=1, le=MOST_TURNS)] = 5.0
    think: Annotated[float, Meta(ge=0, le=1e6)] = 10.0
    branch: Annotated[float, Meta(ge=1, le=64)] = 1.0

    def number(self, rng: Random) -> int:
        """Draw a number of turns."""
        turns = 1
        while turns < MOST_TURNS and rng.random() * self.turns >= 1.0:
            turns += 1
        return turns


class SharedPrefix(Form):
    """Tokens with which each session begins, in common with those of its group; groups are drawn by Zipf's
    law."""

    tokens: Annotated[float, Meta(ge=1, le=1e6)]
    groups: Annotated[float, Meta(ge=1, le=1e6)] = 1.0
    alpha: Alpha = 0.0


def parse_sessions(text: str | None) -> Session:
    """Parse "chat:turns=5,think=10,branch=1"; None: one turn. Raises ConfigError."""
    return parse_form("sessions", text or "chat:turns=1", {"chat": Session})


def parse_shared(text: str | None) -> SharedPrefix | None:
    """Parse "tokens:1024,groups=8,alpha=1"; None: nothing in common. Raises ConfigError."""
    return None if text is None else parse_form("shared_prefix", text, {"tokens": SharedPrefix})


class Sessions:
    """Draws the turns of sessions."""

    def __init__(self, session: Session, shared: SharedPrefix | None, seed: int) -> None:
        self._session = session
        self._rng = stream(seed, "sessions")
        self._count = 0
        self._shared = 0 if shared is None else int(shared.tokens)
        self._groups = None if shared is None else Weighted(zipf(int(shared.groups), shared.alpha))

    def draw(self, first: tuple[int, int], lengths: Callable[[], tuple[int, int]]) -> Iterator[Arrival]:
        """Draw one session: requests without time, adapter and tenant. ``first`` is the length of its first
        question and answer; ``lengths`` draws others."""
        rng, number, branches = self._rng, self._count, int(self._session.branch)
        self._count += 1
        turns = self._session.number(rng)
        group = 0 if self._groups is None else self._groups.draw(rng)
        history = self._shared
        for turn in range(turns):
            think = exponential(rng) * self._session.think if turn else 0.0
            last = turn == turns - 1
            said = 0
            for branch in range(branches):
                question, answer = first if turn == branch == 0 else lengths()
                prompt = history + question
                yield Arrival(
                    0.0,
                    None,
                    prompt,
                    answer,
                    prefix=self._prefix(number, group, prompt if branch == 0 else history),
                    after=branches + branch if turn else 0,
                    think=think,
                    more=branch == 0 and not last,
                    first=turn == branch == 0,
                    last=last and branch == branches - 1,
                )
                said = said or question + answer
            history += said

    def _prefix(self, session: int, group: int, tokens: int) -> tuple[int, ...]:
        """Return a number for each whole block of the tokens that another request may have; of a branch's own
        question there is none."""
        shared = self._shared // PREFIX_BLOCK
        common = [_SHARED + group * _BLOCKS + block for block in range(shared)]
        return (*common, *(_SESSION + session * _BLOCKS + at for at in range(shared, tokens // PREFIX_BLOCK)))
