"""Sessions: requests that follow each other, each with what was said before at the beginning of its
prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random
from typing import NamedTuple

from aioengine.lab.workload.popularity import zipf
from aioengine.lab.workload.random_streams import Weighted, exponential, stream
from aioengine.lab.workload.requests import PREFIX_BLOCK
from aioengine.lab.workload.spec_text import Option, parse_form

FORMS = {
    "chat": {
        "turns": Option(5.0, low=1.0, high=1000.0, above=False),
        "think": Option(10.0, low=0.0, high=1e6, above=False),
    },
    "agents": {
        "turns": Option(5.0, low=1.0, high=1000.0, above=False),
        "think": Option(0.5, low=0.0, high=1e6, above=False),
        "branch": Option(4.0, low=1.0, high=64.0, above=False),
    },
}
SHARED_FORMS = {
    "tokens": {
        "tokens": Option(low=1.0, high=1e6, above=False),
        "groups": Option(1.0, low=1.0, high=1e6, above=False),
        "alpha": Option(0.0, low=0.0, high=100.0, above=False),
    }
}
MOST_TURNS = 1000
_BLOCKS = 4096
"""Numbers for the blocks of one prompt."""
_SHARED, _SESSION = 2**33, 2**34
"""First numbers of shared beginnings and of sessions; a trace's numbers are below 2**32."""


class Turn(NamedTuple):
    """One request of a session."""

    prompt_tokens: int
    output_tokens: int
    prefix: tuple[int, ...]
    after: int
    """Distance back, within the session, to the request that has to end first; 0: there is none."""
    think: float
    """Seconds from that end."""
    more: bool
    """Whether requests that wait for it follow."""
    first: bool
    last: bool
    """Whether it is the session's first, and its last, request."""


class Sessions:
    """The turns of sessions.

    A session has a geometric number of turns of the mean ``turns``. A turn's prompt is all that was said
    before and a new question; it comes an exponential time, of the mean ``think`` seconds, after the answer
    to the one before. With ``branch`` every turn is that many requests at once, with the same history and a
    question each, and the session goes on after the first of them: agents that fork.

    Args:
        form: "chat:turns=5,think=10" or "agents:turns=5,think=0.5,branch=4"; None: one turn.
        shared: "tokens:1024,groups=8,alpha=1": each session begins with 1024 tokens that it has in common
            with those of its group; groups are drawn by Zipf's law. None: nothing in common.
    """

    def __init__(self, form: str | None, shared: str | None, seed: int) -> None:
        values = parse_form("sessions", form or "chat:turns=1", FORMS).values
        self._turns, self._think = values["turns"], values["think"]
        self._branch = int(values.get("branch", 1))
        self._rng = stream(seed, "sessions")
        self._count = 0
        self._shared = 0
        self._groups: Weighted | None = None
        if shared is not None:
            common = parse_form("shared_prefix", shared, SHARED_FORMS).values
            self._shared = int(common["tokens"])
            self._groups = Weighted(zipf(int(common["groups"]), common["alpha"]))

    def draw(self, first: tuple[int, int], lengths: Callable[[], tuple[int, int]]) -> Iterator[Turn]:
        """Draw one session. ``first`` is the length of its first question and answer; ``lengths`` draws
        others."""
        rng, number = self._rng, self._count
        self._count += 1
        turns = self._number_of_turns(rng)
        group = 0 if self._groups is None else self._groups.draw(rng)
        history = self._shared
        since = 0
        """Requests since the one that the next turn waits for."""
        for turn in range(turns):
            think = exponential(rng) * self._think if turn else 0.0
            last = turn == turns - 1
            said = 0
            for branch in range(self._branch):
                question, answer = first if turn == branch == 0 else lengths()
                prompt = history + question
                yield Turn(
                    prompt,
                    answer,
                    self._prefix(number, group, history, prompt, branch),
                    since + branch if turn else 0,
                    think,
                    more=branch == 0 and not last,
                    first=turn == branch == 0,
                    last=last and branch == self._branch - 1,
                )
                said = said or question + answer
            history += said
            since = self._branch

    def _number_of_turns(self, rng: Random) -> int:
        turns = 1
        while turns < MOST_TURNS and rng.random() * self._turns >= 1.0:
            turns += 1
        return turns

    def _prefix(self, session: int, group: int, history: int, prompt: int, branch: int) -> tuple[int, ...]:
        """Return a number for each whole block of the prompt; of a branch's own question there is none."""
        shared = self._shared // PREFIX_BLOCK
        own = (prompt if branch == 0 else history) // PREFIX_BLOCK
        common = [_SHARED + group * _BLOCKS + block for block in range(shared)]
        return (*common, *(_SESSION + session * _BLOCKS + block for block in range(shared, own)))


def check_sessions(form: str | None, shared: str | None) -> None:
    """Raise ConfigError if one of the texts is not valid."""
    if form is not None:
        parse_form("sessions", form, FORMS)
    if shared is not None:
        parse_form("shared_prefix", shared, SHARED_FORMS)
