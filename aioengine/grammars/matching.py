"""The engine's side of compiled grammars: their masks, and the requests that follow them.

The step thread and the loop's thread call it. It computes no masks: a constraint asks the worker for a mask
before the forward pass, and collects it afterwards.
"""

from __future__ import annotations

import select
import socket
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence
from typing import Any

from aioengine.grammars.wire import Ask, Forget, Inbox, Mask, frame
from aioengine.step import OutputView

SLOW_SECONDS = 0.005
"""Steps do not wait for a row whose last mask took longer than this."""
PATIENCE_SECONDS = 60.0
"""Maximum seconds to wait for a mask outside of a step."""


class _PendingMask:
    """A mask that is being computed, or is there."""

    __slots__ = ("answer", "asked", "grammar")

    def __init__(self, grammar: Grammar) -> None:
        self.grammar = grammar
        self.asked = time.monotonic()
        self.answer: Mask | None = None


class Masks:
    """The masks that the worker computes; any thread may ask for them.

    Args:
        connection: The engine's end of the socket; closed with this object.
        wall_seconds: The worker is killed if a mask takes longer.
        kill: Ends the worker; called on any thread.
    """

    def __init__(self, connection: socket.socket, wall_seconds: float, kill: Callable[[], None]) -> None:
        self.ended: str | None = None
        """Why there are no more masks."""
        connection.setblocking(False)
        self._connection = connection
        self._wall_seconds = wall_seconds
        self._kill = kill
        self._inbox = Inbox()
        self._asked: dict[int, _PendingMask] = {}
        self._number = 0
        self._forgotten: deque[Forget] = deque()
        self._out = bytearray()
        self._lock = threading.RLock()
        self._is_cut_off = False
        self._has_ended = threading.Event()

    def forget(self, text: int, row: int) -> None:
        """Have the worker forget a row. The garbage collector calls it on any thread at any moment, so it
        must not lock."""
        self._forgotten.append(Forget(text, row))

    def ask(self, grammar: Grammar, row: int, tokens: Sequence[int], *, afresh: bool) -> _PendingMask:
        """Ask for a row's mask after ``tokens`` more (or, with ``afresh``, after ``tokens`` alone). Raises
        ValueError if there are no more masks."""
        with self._lock:
            grammar.check()
            self._number += 1
            asked = self._asked[self._number] = _PendingMask(grammar)
            while self._forgotten:
                self._out += frame(self._forgotten.popleft())
            owner = grammar.rows.get(row)
            self._out += frame(Ask(grammar.number, row, self._number, owner, list(tokens), afresh))
            self._flush()
            return asked

    def collect(self, asked: _PendingMask, seconds: float) -> bool:
        """Wait for the answer, at most ``seconds``; returns whether it has come. Raises ValueError if it
        never will."""
        until = time.monotonic() + seconds
        while True:
            with self._lock:
                asked.grammar.check()
                self._flush()
                self._receive()
                if asked.answer is not None:
                    return True
                now = time.monotonic()
                if now - asked.asked > self._wall_seconds:
                    asked.grammar.fail(f"a token's mask took longer than {self._wall_seconds:g} s")
                    self._kill()
                    asked.grammar.check()
                left = until - now
                if left <= 0:
                    return False
                waits = select.poll()
                waits.register(self._connection, select.POLLIN | (select.POLLOUT if self._out else 0))
                cut_off = self._is_cut_off
            if cut_off:
                self._has_ended.wait(left)  # the reason arrives soon
            else:
                waits.poll(left * 1000)

    def end(self, why: str) -> None:
        """Note that the worker has ended."""
        with self._lock:
            self.ended = self.ended or why
            self._connection.close()
            self._asked.clear()
        self._has_ended.set()

    def _flush(self) -> None:
        try:
            while self._out:
                del self._out[: self._connection.send(self._out)]
        except BlockingIOError:
            pass
        except OSError:
            self._is_cut_off = True

    def _receive(self) -> None:
        while not self._is_cut_off:
            try:
                data = self._connection.recv(65536)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            self._is_cut_off = not data
            is_all = len(data) < 65536
            for mask in self._inbox.add(data):
                asked = self._asked.pop(mask.number)
                asked.answer = mask
                asked.grammar.memory = mask.memory
            if is_all:
                return


class Grammar:
    """A text that the worker has compiled."""

    def __init__(self, text: str, number: int, memory: int, masks: Masks) -> None:
        self.text = text
        self.number = number
        """Its number in the worker."""
        self.memory = memory
        """Bytes that it takes, as last reported."""
        self.masks = masks
        self.rows: dict[int, str | None] = {}
        """The constraints that follow the grammar now, and their tenants."""
        self.failure: str | None = None
        """Why the grammar itself can no longer be used."""
        self._next_row = 0

    @property
    def is_lost(self) -> bool:
        """Whether the worker has ended, and the grammar may go on in another."""
        return self.failure is None and self.masks.ended is not None

    def follow(self, tenant: str | None, replace: Callable[[GrammarConstraint], None]) -> GrammarConstraint:
        """Create a constraint for one request. ``replace`` is called, on any thread, when its grammar is
        lost."""
        constraint = GrammarConstraint(self.text, replace)
        self.join(constraint, tenant)
        return constraint

    def join(self, constraint: GrammarConstraint, tenant: str | None) -> None:
        """Let a constraint follow this grammar from now on. Called on the loop."""
        row = self._next_row
        self._next_row += 1
        self.rows[row] = tenant
        weakref.finalize(constraint, self._drop, row)
        constraint.use(self, row)

    def fail(self, why: str) -> None:
        """Mark the grammar as unusable."""
        self.failure = self.failure or why

    def check(self) -> None:
        """Raise ValueError if the grammar cannot be used any more."""
        if why := self.failure or self.masks.ended:
            raise ValueError(why)

    def _drop(self, row: int) -> None:
        self.rows.pop(row, None)
        self.masks.forget(self.number, row)


class GrammarConstraint:
    """A :class:`~aioengine.request.StartedConstraint` that follows one request's output."""

    def __init__(self, text: str, replace: Callable[[GrammarConstraint], None]) -> None:
        self.text = text
        self._replace = replace
        self._lock = threading.Lock()
        self._there = threading.Event()
        """Set while there is a grammar to follow, or a reason for its absence."""

    def use(self, grammar: Grammar, row: int) -> None:
        """Follow ``grammar`` from the beginning of the output."""
        with self._lock:
            self._grammar = grammar
            self._row = row
            self._known: OutputView | None = OutputView(())
            """The output that the parser has seen; None: the parser must begin again."""
            self._asked: _PendingMask | None = None
            self._seconds = 0.0
            self._why = ""
            self.forced: Sequence[int] = ()
            """Tokens that must follow, after the only one that the last answer allows."""
        self._there.set()

    def give_up(self, why: str) -> None:
        """Fail the constraint, because no grammar replaces the lost one."""
        self._why = why
        self._there.set()

    @property
    def slow(self) -> bool:
        return self._seconds > SLOW_SECONDS

    def begin(self, output: Sequence[int]) -> None:
        """Ask for the mask after ``output``. Raises ValueError if the grammar cannot be used any more."""
        if self._is_there(0.0):
            with self._lock:
                self._begin(output)

    def _is_there(self, seconds: float) -> bool:
        """Wait for a grammar, at most ``seconds``; returns whether there is one. A lost one is requested
        again: the output is known, and the parser follows it."""
        if self._there.is_set() and not self._why and self._grammar.is_lost:
            self._there.clear()
            self._replace(self)
        if not self._there.wait(seconds):
            return False
        if self._why:
            raise ValueError(self._why)
        return True

    def _begin(self, output: Sequence[int]) -> None:
        known = self._known
        seen = output if isinstance(output, OutputView) else OutputView(list(output))
        same = len(known) if known is not None and seen.begins_with(known) else None
        if self._asked is not None and same == len(seen):
            return
        self._asked = self._grammar.masks.ask(self._grammar, self._row, seen[same:], afresh=same is None)
        self._known = seen

    def poll(self, output: Sequence[int], seconds: float) -> bytes | None:
        """Return the mask if it arrives within ``seconds``. Raises ValueError if ``output`` does not conform,
        or the parser gives up."""
        if not self._is_there(seconds):
            return None
        grammar = self._grammar
        try:
            with self._lock:
                self._begin(output)
            asked = self._asked
            assert asked is not None
            if not grammar.masks.collect(asked, seconds):
                return None
        except ValueError:
            if grammar.is_lost:
                return None
            raise
        assert asked.answer is not None
        self._seconds = asked.answer.seconds
        if asked.answer.why:
            self._known = self._asked = None
            raise ValueError(asked.answer.why)
        self.forced = asked.answer.forced
        return asked.answer.mask

    def allowed(self, output: Sequence[int]) -> bytes:
        """Return the mask as :meth:`poll` does, but wait for it. Raises ValueError if it does not come within
        ``PATIENCE_SECONDS``."""
        until = time.monotonic() + PATIENCE_SECONDS
        while (mask := self.poll(output, 0.1)) is None:
            if time.monotonic() > until:
                raise ValueError("the grammar's masks are late")
        return mask


def largest_of_most(grammars: Collection[Any]) -> Any:
    """Return the largest grammar of the tenant whose grammars take the most memory. A grammar's is divided
    among the tenants that use it."""
    taken: Counter[str | None] = Counter()
    for grammar in grammars:
        users = set(grammar.rows.values())
        for tenant in users:
            taken[tenant] += grammar.memory // len(users)
    most = max(taken, key=lambda tenant: taken[tenant], default=None)
    of_most = [grammar for grammar in grammars if most in grammar.rows.values()]
    return max(of_most or grammars, key=lambda grammar: grammar.memory)
