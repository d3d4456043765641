"""Grammars of one engine. Each text is compiled once for all its requests, and a bounded number is kept."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections import OrderedDict
from collections.abc import Callable, Iterable
from itertools import count

from aioengine.errors import AioEngineError, EngineOverloaded, EngineStopped, RequestInvalid
from aioengine.grammars.limits import GrammarLimits, MiB, check_characters
from aioengine.grammars.matching import Grammar, GrammarConstraint, largest_of_most
from aioengine.grammars.wire import Compile
from aioengine.grammars.worker_process import Tokens, WorkerProcess
from aioengine.tasks import WorkInTurns, end_tasks

MEMORY_SECONDS = 0.5
"""Seconds between two looks at the memory of all grammars."""
MAX_COMPILES = 3
MAX_OF_A_TENANT = 2
"""Compiles at a time, of all tenants and of one."""
MAX_ENDS = 2
"""A text is refused after the worker has ended this often while it was busy with it."""
MAX_REMEMBERED = 256
"""Texts that are remembered for that."""

_STOPPED = "the engine was stopped, and guided decoding with it"

logger = logging.getLogger("aioengine")

Tenant = str | None


class TooMuch(RequestInvalid):
    """The grammar exceeded its limits."""


class WorkerLost(EngineOverloaded):
    """The worker, or the child that tried the text, ended for a reason other than the grammar."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}; try again later")


class Grammars:
    """Compiles grammars and keeps them, in a worker process.

    Args:
        tokens: Builds the description of the model's tokens for the worker; called in a thread.
        told: Called after each compile with its outcome ("compiled", "limit", "invalid", "overloaded" or
            "failed") and seconds of wall time.

    Nothing is started before it is needed. All methods are called on one loop.
    """

    def __init__(
        self,
        tokens: Callable[[], Tokens],
        *,
        limits: GrammarLimits | None = None,
        told: Callable[[str, float], None] = lambda outcome, seconds: None,
    ) -> None:
        self.limits = GrammarLimits() if limits is None else limits
        self._make_tokens = tokens
        self._told = told
        self._tokens: Tokens | None = None
        self._worker: asyncio.Task[WorkerProcess] | None = None
        """Start of the worker, on first use and after a loss."""
        self._numbers = count(1)
        self._kept: OrderedDict[str, Grammar] = OrderedDict()
        """Grammars by text, the least recently used first."""
        self._compiles = WorkInTurns[str, Grammar](MAX_COMPILES, MAX_OF_A_TENANT)
        self._in_work: dict[int, str] = {}
        """Texts of the worker that are not kept yet, by number."""
        self._ends: OrderedDict[str, int] = OrderedDict()
        """How often the worker has ended with a text."""
        self._watch: asyncio.TimerHandle | None = None
        self._replacing: set[asyncio.Task[None]] = set()
        self._is_closed = False

    @property
    def kept(self) -> int:
        """Number of compiled grammars."""
        return len(self._kept)

    @property
    def waiting(self) -> int:
        """Number of texts that are being compiled or wait for it."""
        return len(self._compiles.shared.jobs)

    def check_size(self, texts: Iterable[str]) -> None:
        """Raise RequestInvalid if the texts of a grammar have too many characters."""
        check_characters(texts, self.limits.max_characters)

    async def constraint(self, text: str, tenant: Tenant) -> GrammarConstraint:
        """Build a constraint for one request. If the call is cancelled and no other request waits for this
        text, the compile is stopped.

        Raises:
            RequestInvalid: The grammar is malformed, or takes more than its limits to compile.
            EngineOverloaded: Too many of the tenant's grammars wait to be compiled, or too many are in use.
            ConfigError: Guided decoding is not available for this model, or on this system.
            EngineStopped: The engine has stopped.
        """
        self.check_size((text,))
        grammar = await self._compiled(text, tenant)
        return grammar.follow(tenant, self._replacer(tenant))

    def _replacer(self, tenant: Tenant) -> Callable[[GrammarConstraint], None]:
        """Return a function that finds another grammar for a constraint that lost its own; it may be called
        on any thread."""
        loop = asyncio.get_running_loop()

        async def replace(constraint: GrammarConstraint) -> None:
            try:
                grammar = await self._compiled(constraint.text, tenant)
            except AioEngineError as error:
                constraint.give_up(str(error))
            else:
                grammar.join(constraint, tenant)

        def begin(constraint: GrammarConstraint) -> None:
            task = loop.create_task(replace(constraint), name="aioengine-grammars")
            self._replacing.add(task)
            task.add_done_callback(self._replacing.discard)

        def call(constraint: GrammarConstraint) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and the engine gone
                loop.call_soon_threadsafe(begin, constraint)

        return call

    async def _compiled(self, text: str, tenant: Tenant) -> Grammar:
        """Return the text's grammar, compiled if need be."""
        if (kept := self._usable(text)) is not None:
            return kept
        waiting = sum(owner == tenant for owner, _ in self._compiles.shared.jobs)
        if waiting >= self.limits.max_queued and (tenant, text) not in self._compiles.shared.jobs:
            raise EngineOverloaded(f"already {waiting} grammars wait to be compiled; try again later")
        return await self._compiles.result(tenant, text, lambda: self._in_turn(text))

    def _usable(self, text: str) -> Grammar | None:
        if self._is_closed:
            raise EngineStopped(_STOPPED)
        grammar = self._kept.get(text)
        if grammar is None or grammar.failure or grammar.is_lost:
            return None
        self._kept.move_to_end(text)
        return grammar

    # Compiling

    async def _in_turn(self, text: str) -> Grammar:
        """Compile the text, in a tenant's turn."""
        if (kept := self._usable(text)) is not None:  # for another tenant, meanwhile
            return kept
        clock = asyncio.get_running_loop().time
        began = clock()
        try:
            try:
                grammar = await self._compile(text)
            except WorkerLost:
                grammar = await self._compile(text)
        except Exception as error:
            if not isinstance(error, AioEngineError):
                logger.exception("a grammar could not be compiled")
            kinds = {TooMuch: "limit", RequestInvalid: "invalid", EngineOverloaded: "overloaded"}
            outcomes = (name for kind, name in kinds.items() if isinstance(error, kind))
            self._told(next(outcomes, "failed"), clock() - began)
            raise
        self._told("compiled", clock() - began)
        return grammar

    async def _compile(self, text: str) -> Grammar:
        """Compile one text. Raises EngineOverloaded, RequestInvalid, ConfigError, WorkerLost."""
        if self._ends.get(text, 0) >= MAX_ENDS:
            raise TooMuch("the grammar has ended the process that compiles and follows grammars")
        worker = await self._live_worker()
        number = next(self._numbers)
        self._in_work[number] = text
        try:
            async with asyncio.timeout(self.limits.compile_wall_seconds):
                done = await worker.compile(Compile(number, text))
            if done is None:
                raise WorkerLost("the process that compiles grammars was lost")
            if done.why:
                raise RequestInvalid(f"the grammar cannot be used: {done.why}")
            if done.status != 0:
                raise _trial_error(done.status, self.limits)
        except BaseException as error:
            worker.drop(number)
            if not isinstance(error, TimeoutError):
                raise
            seconds = self.limits.compile_wall_seconds
            raise TooMuch(f"the grammar takes more than {seconds:g} s to compile (machine busy?)") from None
        finally:
            del self._in_work[number]
        grammar = self._kept[text] = Grammar(text, number, done.memory, worker.masks)
        self._drop_unused(lambda: len(self._kept) > self.limits.max_kept)
        if self._watch is None:
            self._look_at_memory()
        return grammar

    async def _live_worker(self) -> WorkerProcess:
        start = self._worker
        if start is None or (start.done() and (start.exception() is not None or not start.result().alive)):
            start = self._worker = asyncio.create_task(self._start_worker(start), name="aioengine-grammars")
        return await asyncio.shield(start)

    async def _start_worker(self, before: asyncio.Task[WorkerProcess] | None) -> WorkerProcess:
        if before is not None and before.exception() is None:
            logger.warning("the process that compiles grammars was lost; it is started again")
            await before.result().close()
        if self._tokens is None:
            self._tokens = await asyncio.to_thread(self._make_tokens)
        return await WorkerProcess.start(self._tokens, self.limits, self._worker_ended)

    def _worker_ended(self, doing: set[int]) -> None:
        """Note which texts the worker was busy with. All others are compiled again where they are needed."""
        texts = self._in_work | {grammar.number: text for text, grammar in self._kept.items()}
        for text in {texts[number] for number in doing if number in texts}:
            ends = self._ends[text] = self._ends.pop(text, 0) + 1
            if ends >= MAX_ENDS and text in self._kept:
                self._kept[text].fail("the grammar has ended the process that follows it")
            if len(self._ends) > MAX_REMEMBERED:
                self._ends.popitem(last=False)
        for grammar in list(self._kept.values()):
            grammar.masks.end("the process that follows the grammar was lost; try again")
        self._kept.clear()

    # Keeping

    def _drop_unused(self, too_many: Callable[[], bool]) -> None:
        for grammar in list(self._kept.values())[:-1]:  # the last one has just been compiled for somebody
            if not too_many():
                return
            if not grammar.rows:
                self._drop(grammar, "it was not used")

    def _drop(self, grammar: Grammar, why: str) -> None:
        grammar.fail(why)
        del self._kept[grammar.text]
        if self._worker is not None and self._worker.done():
            self._worker.result().drop(grammar.number)

    def _look_at_memory(self) -> None:
        """Look at the memory now, and again as long as there are grammars."""
        limits = self.limits

        def too_much() -> bool:
            return sum(grammar.memory for grammar in self._kept.values()) > limits.total_memory

        for grammar in list(self._kept.values()):
            if grammar.memory > limits.memory:
                self._drop(grammar, f"the grammar takes more than {limits.memory // MiB} MiB")
        self._drop_unused(too_much)
        while too_much():
            self._drop(
                largest_of_most(self._kept.values()),
                f"all grammars together took more than {limits.total_memory // MiB} MiB, and its tenant's "
                "the most of them",
            )
        self._watch = None
        if self._kept:
            self._watch = asyncio.get_running_loop().call_later(MEMORY_SECONDS, self._look_at_memory)

    async def close(self) -> None:
        """End the worker and wait for its end. Callers that wait for a compile get EngineStopped."""
        self._is_closed = True
        await end_tasks(self._compiles.shared.close(EngineStopped(_STOPPED)))
        if self._watch is not None:
            self._watch.cancel()
        for grammar in self._kept.values():
            grammar.fail(_STOPPED)
        start = self._worker
        if start is not None:
            start.cancel()
            await asyncio.wait([start])
            if not start.cancelled() and start.exception() is None:
                await start.result().close()
        if self._replacing:
            await asyncio.wait(self._replacing)


def _trial_error(status: int, limits: GrammarLimits) -> AioEngineError:
    """Explain the end of the child that tried a text."""
    if status in (-signal.SIGPROF, -signal.SIGXCPU):
        return TooMuch(
            f"the grammar takes more than {limits.compile_seconds:g} s of processor time to compile"
        )
    if status == -signal.SIGABRT:
        return TooMuch(f"the grammar takes more than {limits.memory // MiB} MiB to compile")
    if status in (-signal.SIGSEGV, -signal.SIGBUS):
        return TooMuch("the grammar is nested too deeply to be compiled: its compiler's stack is full")
    return WorkerLost(f"the process that compiled the grammar was lost (status {status})")
