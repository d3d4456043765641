"""Compiled grammars, and the requests that follow them: masks are asked for before the forward pass, and
collected after it."""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence
from concurrent.futures import Future
from typing import NamedTuple

from aioengine.grammars.process import WorkerLost, WorkerProcess
from aioengine.grammars.wire import Ask, Drop, Mask, numbers
from aioengine.step import OutputView

SLOW_SECONDS = 0.005
"""Steps do not wait for a row whose last mask took longer than this."""
PATIENCE_SECONDS = 60.0
"""Maximum seconds to wait for a mask outside of a step."""


class Place(NamedTuple):
    """Where a grammar is compiled."""

    worker: WorkerProcess
    number: int
    """Its number there."""


class Grammar:
    """A text that a worker has compiled. If that is lost, the text gets another place."""

    place: Place
    memory: int
    """Bytes that it takes, as last reported."""

    def __init__(self, text: str, wall_seconds: float) -> None:
        self.text = text
        self.wall_seconds = wall_seconds
        """Maximum seconds for a mask."""
        self.rows: dict[int, str | None] = {}
        """The constraints that follow the grammar now, and their tenants."""
        self.failure: str | None = None
        """Why it can no longer be used."""
        self.ends = 0
        """How often the worker has ended while it computed the text's masks."""

    def fail(self, why: str) -> None:
        """Mark the grammar as unusable."""
        self.failure = self.failure or why

    def forget(self, row: int) -> None:
        """Forget a row. The garbage collector calls it, on any thread at any moment."""
        del self.rows[row]
        self.place.worker.tell(Drop(self.place.number, row))


class GrammarConstraint:
    """A :class:`~aioengine.request.StartedConstraint` that follows one request's output."""

    def __init__(self, grammar: Grammar, tenant: str | None) -> None:
        self.forced: Sequence[int] = ()
        """Tokens that must follow, after the only one that the last answer allows."""
        self._grammar = grammar
        self._tenant = tenant
        self._row = next(numbers)
        grammar.rows[self._row] = tenant
        weakref.finalize(self, grammar.forget, self._row)
        self._place: Place | None = None
        """Where the parser is."""
        self._known = OutputView(())
        """The output that it has seen."""
        self._asked: Future[Mask] | None = None
        """Its mask after that; None: the parser must begin again."""
        self._asked_at = 0.0
        self._seconds = 0.0

    @property
    def slow(self) -> bool:
        return self._seconds > SLOW_SECONDS

    def begin(self, output: Sequence[int]) -> None:
        """Ask for the mask after ``output``. Raises ValueError if the grammar cannot be used any more."""
        grammar, place = self._grammar, self._grammar.place
        if grammar.failure:
            raise ValueError(grammar.failure)
        seen = output if isinstance(output, OutputView) else OutputView(list(output))
        goes_on = self._asked is not None and place is self._place and seen.begins_with(self._known)
        if goes_on and len(seen) == len(self._known):
            return
        tokens = seen[len(self._known) if goes_on else 0 :]
        owner, afresh = self._tenant, not goes_on
        ask = Ask(next(numbers), place.number, self._row, owner, tokens, afresh=afresh, slow=self.slow)
        self._asked, self._asked_at = place.worker.ask(ask), time.monotonic()
        self._place, self._known = place, seen

    def poll(self, output: Sequence[int], seconds: float) -> bytes | None:
        """Return the mask if it arrives within ``seconds``. Raises ValueError if ``output`` does not conform,
        or the parser gives up."""
        self.begin(output)
        assert self._asked is not None
        try:
            answer = self._asked.result(seconds)
        except WorkerLost:
            time.sleep(seconds)  # the loop finds another place
            return None
        except TimeoutError:
            grammar = self._grammar
            if time.monotonic() - self._asked_at > grammar.wall_seconds:
                grammar.fail(f"a token's mask took longer than {grammar.wall_seconds:g} s")
                grammar.place.worker.kill()
            return None
        self._seconds, self._grammar.memory = answer.seconds, answer.memory
        if answer.why:
            self._asked = None
            raise ValueError(answer.why)
        self.forced = answer.forced
        return answer.mask

    def allowed(self, output: Sequence[int]) -> bytes:
        """Return the mask as :meth:`poll` does, but wait for it. Raises ValueError if it does not come within
        ``PATIENCE_SECONDS``."""
        until = time.monotonic() + PATIENCE_SECONDS
        while (mask := self.poll(output, 0.1)) is None:
            if time.monotonic() > until:
                raise ValueError("the grammar's masks are late")
        return mask
