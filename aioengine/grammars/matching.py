"""The engine's side of a compiled grammar: its process, and the requests that follow it.

The step thread and the loop's thread call it. It computes no masks: a constraint asks the grammar's process
for a mask before the forward pass, and collects it afterwards.
"""

from __future__ import annotations

import select
import socket
import threading
import time
import weakref
from array import array
from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence

from aioengine.grammars.places import Places
from aioengine.grammars.wire import AFRESH, ASK, FORGET, GO_ON, MASK
from aioengine.step import OutputView

MAX_LOSSES = 2
"""A row fails after its grammar's process was lost this often without a known fault of the grammar."""
SLOW_SECONDS = 0.005
"""Steps do not wait for a row whose last mask took longer than this."""
PATIENCE_SECONDS = 60.0
"""Maximum seconds to wait for a mask outside of a step."""


class _Ask:
    """A mask that is being computed, or is in its place."""

    __slots__ = ("asked", "forced", "mask", "number", "place", "seconds", "why")

    def __init__(self, number: int, place: int) -> None:
        self.number = number
        self.place = place
        self.asked = time.monotonic()
        self.mask = b""
        self.forced: Sequence[int] = ()
        """Tokens that must follow the only one that the mask allows."""
        self.seconds = 0.0
        """Seconds of processor time that the mask took."""
        self.why = ""
        """The fault, if there is no mask."""


class Grammar:
    """A grammar's process, once it has compiled.

    Args:
        text: The grammar.
        connection: The engine's end of the process's socket; non-blocking, and closed with this object.
        places: Where the process writes masks.
        wall_seconds: The process is killed if a mask takes longer.
        kill: Ends the process; called on any thread.
        unused: Called on any thread when no request uses the grammar any more.
    """

    def __init__(
        self,
        text: str,
        connection: socket.socket,
        places: Places,
        *,
        memory: int,
        wall_seconds: float,
        kill: Callable[[], None],
        unused: Callable[[], None],
    ) -> None:
        self.text = text
        self.memory = memory
        """Private bytes of its process, as last reported."""
        self.rows: dict[int, str | None] = {}
        """The constraints that follow the grammar now, and their tenants."""
        self.failure: str | None = None
        """Reason why the grammar can no longer be used."""
        self.is_lost = False
        """Whether its process ended for a reason other than the grammar."""
        self._connection = connection
        self._places = places
        self._wall_seconds = wall_seconds
        self._kill = kill
        self._unused = unused
        self._asks: dict[int, _Ask] = {}
        self._next_row = self._next_number = 0
        self._forgotten: deque[int] = deque()
        self._out = bytearray()
        self._in = bytearray()
        self._lock = threading.RLock()
        self._is_cut_off = False
        self._ended = threading.Event()

    def follow(self, tenant: str | None, replace: Callable[[GrammarConstraint], None]) -> GrammarConstraint:
        """Create a constraint for one request. ``replace`` is called, on any thread, when its grammar is
        lost."""
        constraint = GrammarConstraint(self.text, replace)
        self.join(constraint, tenant)
        return constraint

    def join(self, constraint: GrammarConstraint, tenant: str | None) -> None:
        """Let a constraint follow this grammar from now on."""
        with self._lock:
            row = self._next_row
            self._next_row += 1
            self.rows[row] = tenant
        weakref.finalize(constraint, self._drop, row)
        constraint.use(self, row)

    def fail(self, why: str) -> None:
        """Mark the grammar as unusable, and kill its process if that still runs."""
        with self._lock:
            if self.failure is not None:
                return
            self.failure = why
            self._kill()
            self._connection.close()

    def process_ended(self, why: str, *, is_lost: bool = False) -> None:
        """Note that the grammar's process has ended, so it writes to no place any more."""
        with self._lock:
            self.is_lost = is_lost and self.failure is None
            self.fail(why)
            for ask in self._asks.values():
                self._places.give_back(ask.place)
            self._asks.clear()
        self._ended.set()

    # For one row

    def ask(self, row: int, tokens: Sequence[int], *, afresh: bool) -> _Ask | None:
        """Ask for a row's mask after ``tokens`` more (or, with ``afresh``, after ``tokens`` alone). None if
        there is no free place, because other rows' masks are late. Raises ValueError if the grammar is
        unusable."""
        with self._lock:
            self._check()
            place = self._places.take(self.rows.get(row))
            if place is None:
                return None
            number = self._next_number = (self._next_number + 1) & 0xFFFFFFFF
            ask = self._asks[number] = _Ask(number, place)
            while self._forgotten:
                self._out += ASK.pack(FORGET, self._forgotten.popleft(), 0, 0, 0)
            self._out += ASK.pack(AFRESH if afresh else GO_ON, row, number, place, len(tokens))
            self._out += array("i", tokens).tobytes()
            self._flush()
            return ask

    def collect(self, ask: _Ask, seconds: float) -> bool:
        """Wait for the answer, at most ``seconds``; returns whether it has come. Raises ValueError if the
        grammar is unusable."""
        until = time.monotonic() + seconds
        while True:
            with self._lock:
                self._check()
                self._flush()
                self._receive()
                if ask.number not in self._asks:
                    return True
                self._check()
                now = time.monotonic()
                if now - ask.asked > self._wall_seconds:
                    self.fail(f"a token's mask took longer than {self._wall_seconds:g} s")
                    self._check()
                left = until - now
                if left <= 0:
                    return False
                waits = select.poll()
                waits.register(self._connection, select.POLLIN | (select.POLLOUT if self._out else 0))
                cut_off = self._is_cut_off
            if cut_off:
                self._ended.wait(left)  # the reason arrives soon
            else:
                waits.poll(left * 1000)

    def _drop(self, row: int) -> None:
        """Forget a row. The garbage collector calls it on any thread at any moment, so it must not lock."""
        self.rows.pop(row, None)
        self._forgotten.append(row)
        if not self.rows:
            self._unused()

    def _check(self) -> None:
        if self.failure is not None:
            raise ValueError(self.failure)

    def _flush(self) -> None:
        try:
            while self._out:
                del self._out[: self._connection.send(self._out)]
        except BlockingIOError:
            pass
        except OSError:
            self._is_cut_off = True

    def _receive(self) -> None:
        if not self._is_cut_off:
            try:
                part = self._connection.recv(65536)
                self._is_cut_off = not part
                self._in += part
            except BlockingIOError:
                return
            except OSError:
                self._is_cut_off = True
        begin = 0
        while len(self._in) - begin >= MASK.size:
            _row, number, size, micros, kib, forced, length = MASK.unpack_from(self._in, begin)
            text = begin + MASK.size + 4 * forced
            end = text + length
            if len(self._in) < end:
                break
            ask = self._asks.pop(number)
            ask.mask = self._places.read(ask.place, size)
            ask.seconds = micros * 1e-6
            if forced:
                ask.forced = array("i", bytes(self._in[begin + MASK.size : text])).tolist()
            ask.why = self._in[text:end].decode(errors="replace")
            self._places.give_back(ask.place)
            self.memory = kib * 1024
            begin = end
        del self._in[:begin]


class GrammarConstraint:
    """A :class:`~aioengine.request.StartedConstraint` that follows one request's output with a parser."""

    def __init__(self, text: str, replace: Callable[[GrammarConstraint], None]) -> None:
        self.text = text
        self._replace = replace
        self._lock = threading.Lock()
        self._losses = 0
        self._there = threading.Event()
        """Set while there is a grammar to follow, or a reason for its absence."""

    def use(self, grammar: Grammar, row: int) -> None:
        """Follow ``grammar`` from the beginning of the output."""
        with self._lock:
            self._grammar = grammar
            self._row = row
            self._known: OutputView | None = OutputView(())
            """The output that the parser has seen; None: the parser must begin again."""
            self._ask: _Ask | None = None
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
        """Ask for the mask after ``output``. Raises ValueError if the grammar's process has ended."""
        if self._is_there(0.0):
            with self._lock:
                self._begin(output)

    def _is_there(self, seconds: float) -> bool:
        """Wait for a grammar, at most ``seconds``; returns whether there is one. A lost one is requested
        again, because a process may be killed for the memory that others take."""
        if not self._there.wait(seconds):
            return False
        if self._why:
            raise ValueError(self._why)
        if not self._grammar.is_lost or self._losses >= MAX_LOSSES:
            return True
        self._losses += 1
        self._there.clear()
        self._replace(self)
        return self._is_there(seconds)

    def _begin(self, output: Sequence[int]) -> None:
        known = self._known
        seen = output if isinstance(output, OutputView) else OutputView(list(output))
        same = -1 if known is None else seen.common(known)
        if self._ask is not None and known is not None and same == len(known) == len(seen):
            return
        afresh = known is None or same < len(known)
        self._ask = self._grammar.ask(self._row, seen[:] if afresh else seen[same:], afresh=afresh)
        if self._ask is not None:
            self._known = seen

    def poll(self, output: Sequence[int], seconds: float) -> bytes | None:
        """Return the mask if it arrives within ``seconds``. Raises ValueError if ``output`` does not conform,
        or the parser gives up."""
        if not self._is_there(seconds):
            return None
        try:
            with self._lock:
                self._begin(output)
            ask = self._ask
            if ask is None or not self._grammar.collect(ask, seconds):
                return None
        except ValueError:
            if self._grammar.is_lost and self._losses < MAX_LOSSES:
                return None
            raise
        self._seconds = ask.seconds
        if ask.why:
            self._known = self._ask = None
            raise ValueError(ask.why)
        self.forced = ask.forced
        return ask.mask

    def allowed(self, output: Sequence[int]) -> bytes:
        """Return the mask as :meth:`poll` does, but wait for it. Raises ValueError if it does not come within
        ``PATIENCE_SECONDS``."""
        until = time.monotonic() + PATIENCE_SECONDS
        while (mask := self.poll(output, 0.1)) is None:
            if time.monotonic() > until:
                raise ValueError("the grammar's masks are late")
        return mask


def largest_of_most(grammars: Collection[Grammar]) -> Grammar:
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
