"""Grammars of one engine. Each text is compiled once for all its requests, and a bounded number is kept."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable

from aioengine.errors import AioEngineError, EngineOverloaded, EngineStopped, RequestInvalid
from aioengine.grammars import endings
from aioengine.grammars.fair_queue import FairQueue
from aioengine.grammars.fair_thread import in_own_thread
from aioengine.grammars.jobs import Job, Outcome
from aioengine.grammars.limits import GrammarLimits, MiB, check_characters
from aioengine.grammars.matching import Grammar, GrammarConstraint, largest_of_most
from aioengine.grammars.wire import COMPILED, text_frame
from aioengine.grammars.zygote_process import ChildProcess, Tokens, ZygoteProcess, read_struct, read_text
from aioengine.runtime.tasks import end_tasks

QUICK_NICE = 5
LONG_NICE = 10
"""Nice value of compiles, so that the model's threads go first."""
MEMORY_SECONDS = 0.5
"""Seconds between two measurements of the memory of all processes."""

_STOPPED = "the engine was stopped, and guided decoding with it"

logger = logging.getLogger("aioengine")


class Grammars:
    """Compiles grammars and keeps them, each in a separate process.

    Args:
        tokens: Builds the description of the model's tokens for the processes; called in a thread.
        vocab: The size of the model's vocabulary.
        rows: Maximum number of requests in one step.
        told: Called after each compile with its outcome (see :func:`outcome_name`) and seconds of wall time.

    Nothing is started before it is needed. All methods are called on one loop.
    """

    def __init__(
        self,
        tokens: Callable[[], Tokens],
        *,
        vocab: int,
        rows: int,
        limits: GrammarLimits | None = None,
        told: Callable[[str, float], None] = lambda outcome, seconds: None,
    ) -> None:
        self.limits = GrammarLimits() if limits is None else limits
        self._make_tokens = tokens
        self._told = told
        self._tokens: Tokens | None = None
        self._num_places = 2 * rows + 8  # twice the rows: the mask of an ended row may still be written
        self._width = -(-vocab // 32) * 4 + 64
        self._zygote: asyncio.Task[ZygoteProcess] | None = None
        """Start of the zygote, on first use and after a loss."""
        self._kept: OrderedDict[str, Grammar] = OrderedDict()
        """Grammars by text, the least recently used first."""
        self._jobs: dict[str, Job] = {}
        self._quick: FairQueue[Job] = FairQueue()
        self._long: FairQueue[Job] = FairQueue()
        self._lanes: list[asyncio.Task[None]] = []
        self._room = asyncio.Event()
        """Set whenever a grammar becomes unused, or is gone."""
        self._watch: asyncio.TimerHandle | None = None
        self._replacing: set[asyncio.Task[None]] = set()
        self._is_closed = False

    @property
    def kept(self) -> int:
        """Number of compiled grammars, each with its process."""
        return len(self._kept)

    @property
    def waiting(self) -> int:
        """Number of texts that are being compiled or wait for it."""
        return len(self._jobs)

    def check_size(self, texts: Iterable[str]) -> None:
        """Raise RequestInvalid if the texts of a grammar have too many characters."""
        check_characters(texts, self.limits.max_characters)

    async def constraint(self, text: str, tenant: str | None) -> GrammarConstraint:
        """Build a constraint for one request. If the call is cancelled and no other request waits for this
        text, the compile is stopped.

        Raises:
            RequestInvalid: The grammar is malformed, or takes more than its limits to compile.
            EngineOverloaded: Too many of the tenant's grammars wait to be compiled, or too many are in use.
            ConfigError: Guided decoding is not available for this model, or on this system.
            EngineStopped: The engine has stopped.
        """
        if self._is_closed:
            raise EngineStopped(_STOPPED)
        self.check_size((text,))
        grammar = self._kept.get(text)
        if grammar is None or grammar.failure is not None:
            grammar = await self._compiled(text, tenant)
        else:
            self._kept.move_to_end(text)
        return grammar.follow(tenant, self._replacer(tenant))

    def _replacer(self, tenant: str | None) -> Callable[[GrammarConstraint], None]:
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

    async def _compiled(self, text: str, tenant: str | None) -> Grammar:
        await self._share(tenant)
        if self._is_closed:
            raise EngineStopped(_STOPPED)
        job = self._jobs.get(text)
        if job is None or tenant not in job.waiters:
            waiting = self._quick.count(tenant) + self._long.count(tenant)
            if waiting >= self.limits.max_queued:
                raise EngineOverloaded(f"already {waiting} grammars wait to be compiled; try again later")
        if job is None:
            job = self._jobs[text] = Job(text)
            job.join(tenant)
            job.enqueue(self._quick)
            self._start_lanes()
        else:
            job.join(tenant)
        try:
            found = await asyncio.shield(job.done)
        finally:
            job.leave(tenant)
            if not job.waiters and not job.done.done():
                self._give_up(job)
        if isinstance(found, AioEngineError):
            raise type(found)(str(found))  # each waiter gets a separate one
        return found

    async def _share(self, tenant: str | None) -> None:
        """Wait until the tenant's requests have fewer grammars than its share."""
        try:
            async with asyncio.timeout(self.limits.room_seconds):
                while not self._is_closed:
                    users = [set(grammar.rows.values()) for grammar in self._kept.values()]
                    tenants = {tenant}.union(*users)
                    share = max(1, self.limits.max_grammars // (1 + len(tenants)))
                    if sum(tenant in used for used in users) < share:
                        return
                    self._room.clear()
                    await self._room.wait()
        except TimeoutError:
            raise EngineOverloaded(
                f"requests that have not ended use {share} different grammars; try again later"
            ) from None

    def _give_up(self, job: Job) -> None:
        del self._jobs[job.text]
        job.done.cancel()
        if job.attempt is not None:
            job.attempt.cancel()

    # Compiling

    def _start_lanes(self) -> None:
        if not self._lanes:
            loop = asyncio.get_running_loop()
            limits = self.limits
            self._lanes = [
                loop.create_task(self._lane(self._quick, limits.quick_seconds, QUICK_NICE)),
                loop.create_task(self._lane(self._long, limits.compile_seconds, LONG_NICE)),
            ]

    async def _lane(self, queue: FairQueue[Job], seconds: float, nice: int) -> None:
        """Compile the queued texts one after another, each in at most ``seconds``."""
        loop = asyncio.get_running_loop()
        while True:
            job = await queue.get()
            job.begin()
            began = loop.time()
            job.attempt = asyncio.create_task(self._attempt(job.text, seconds, nice))
            try:
                await asyncio.wait([job.attempt])
            finally:
                job.attempt.cancel()
            if job.done.cancelled():  # given up
                continue
            outcome = job.attempt.result()
            job.attempt = None
            if isinstance(outcome, endings.TooLong) and queue is self._quick:
                job.enqueue(self._long)
                continue
            if isinstance(outcome, endings.TooLong):
                outcome = endings.TooMuch(str(outcome))
            del self._jobs[job.text]
            self._told(endings.outcome_name(outcome), loop.time() - began)
            if isinstance(outcome, endings.TooMuch):
                outcome = RequestInvalid(str(outcome))
            job.done.set_result(outcome)

    async def _attempt(self, text: str, seconds: float, nice: int) -> Outcome:
        try:
            self._make_room()
            try:
                return await self._compile(text, seconds, nice)
            except endings.Lost:
                return await self._compile(text, seconds, nice)
        except endings.Lost as error:
            return EngineOverloaded(f"{error}; try again later")
        except AioEngineError as error:
            return error
        except OSError as error:
            return EngineOverloaded(f"no process could be started for the grammar: {error}")
        except Exception as error:
            logger.exception("a grammar could not be compiled")
            return AioEngineError(f"the grammar could not be compiled: {type(error).__name__}: {error}")

    async def _compile(self, text: str, seconds: float, nice: int) -> Grammar:
        """Compile one text. Raises RequestInvalid, ConfigError, TooLong, Lost, OSError."""
        zygote = await self._live_zygote()
        try:
            child = zygote.fork(self.limits, compile_seconds=seconds, nice=nice)
        except OSError as error:
            if zygote.alive:
                raise
            raise endings.Lost("the process that compiles grammars was lost") from error
        is_kept = False
        try:
            memory = await self._follow(child, text, seconds)
            grammar = Grammar(
                text,
                child.connection,
                zygote.places,
                memory=memory,
                wall_seconds=self.limits.mask_wall_seconds,
                kill=self._on_loop(lambda: zygote.kill(child)),
                unused=self._on_loop(self._room.set),
            )
            self._keep(grammar, child)
            is_kept = True
            return grammar
        finally:
            if not is_kept:
                zygote.kill(child)
                child.connection.close()

    async def _follow(self, child: ChildProcess, text: str, seconds: float) -> int:
        """Wait for a child's compile; returns the child's memory in bytes."""
        limits = self.limits
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(limits.compile_wall_seconds):
                try:
                    await loop.sock_sendall(child.connection, text_frame(text))
                    is_good, kib = COMPILED.unpack(await read_struct(child.connection, COMPILED.size))
                    why = await read_text(child.connection)
                except (EOFError, ConnectionError):
                    status = await child.exited
                    raise endings.compile_error(status, seconds, limits) from None
        except TimeoutError:
            raise endings.TooMuch(
                f"the grammar takes more than {limits.compile_wall_seconds:g} s to compile (machine busy?)"
            ) from None
        if not is_good:
            raise RequestInvalid(f"the grammar cannot be used: {why}")
        return int(kib) * 1024

    async def _live_zygote(self) -> ZygoteProcess:
        start = self._zygote
        if start is None or (start.done() and (start.exception() is not None or not start.result().alive)):
            start = self._zygote = asyncio.create_task(self._start_zygote(start), name="aioengine-zygote")
        return await asyncio.shield(start)

    async def _start_zygote(self, before: asyncio.Task[ZygoteProcess] | None) -> ZygoteProcess:
        if before is not None and before.exception() is None:
            logger.warning("the process that compiles grammars was lost; it is started again")
            await before.result().close()
        if self._tokens is None:
            self._tokens = await in_own_thread(self._make_tokens)
        return await ZygoteProcess.start(self._tokens, self._num_places, self._width)

    # Keeping

    def _keep(self, grammar: Grammar, child: ChildProcess) -> None:
        self._kept[grammar.text] = grammar

        def ended(status: asyncio.Future[int | None]) -> None:
            found = status.result()
            grammar.process_ended(
                endings.mask_error(found, self.limits), is_lost=found not in endings.OF_ITS_DOING
            )
            self._remove(grammar)

        child.exited.add_done_callback(ended)
        if self._watch is None:
            self._look_at_memory()

    def _remove(self, grammar: Grammar) -> None:
        if self._kept.get(grammar.text) is grammar:
            del self._kept[grammar.text]
        self._room.set()

    def _make_room(self) -> None:
        """Make room for one more process. Raises EngineOverloaded."""
        most = self.limits.max_grammars
        self._drop_unused(lambda: len(self._kept) >= most)
        if len(self._kept) >= most:
            raise EngineOverloaded(
                f"requests that have not ended use {most} different grammars; try again later"
            )

    def _drop_unused(self, too_many: Callable[[], bool]) -> None:
        for grammar in list(self._kept.values()):
            if not too_many():
                return
            if not grammar.rows:
                self._drop(grammar, "it was not used")

    def _drop(self, grammar: Grammar, why: str) -> None:
        grammar.fail(why)
        self._remove(grammar)

    def _look_at_memory(self) -> None:
        """Measure the memory now, and again as long as there are grammars."""
        most = self.limits.total_memory

        def too_much() -> bool:
            return sum(grammar.memory for grammar in self._kept.values()) > most

        self._drop_unused(too_much)
        while too_much():
            self._drop(
                largest_of_most(self._kept.values()),
                f"all grammars together took more than {most // MiB} MiB, and its tenant's the most of them",
            )
        self._watch = None
        if self._kept:
            self._watch = asyncio.get_running_loop().call_later(MEMORY_SECONDS, self._look_at_memory)

    def _on_loop(self, work: Callable[[], None]) -> Callable[[], None]:
        loop = asyncio.get_running_loop()

        def call() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and the engine gone
                loop.call_soon_threadsafe(work)

        return call

    async def close(self) -> None:
        """End all processes and wait for their end. Callers that wait for a compile get EngineStopped."""
        self._is_closed = True
        attempts = [job.attempt for job in self._jobs.values() if job.attempt is not None]
        await end_tasks([*self._lanes, *attempts])
        for job in self._jobs.values():
            if not job.done.done():
                job.done.set_result(EngineStopped(_STOPPED))
        self._jobs.clear()
        if self._watch is not None:
            self._watch.cancel()
        for grammar in list(self._kept.values()):
            grammar.process_ended(_STOPPED)
        start = self._zygote
        if start is not None:
            start.cancel()
            await asyncio.wait([start])
            if not start.cancelled() and start.exception() is None:
                await start.result().close()
        self._room.set()
        if self._replacing:
            await asyncio.wait(self._replacing)
