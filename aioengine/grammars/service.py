"""Grammars of one engine. Each text is compiled once for all its requests, and a bounded number is kept."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection, Sequence
from typing import Any

from aioengine.errors import AioEngineError, EngineOverloaded, EngineStopped, RequestInvalid
from aioengine.grammars.limits import GrammarLimits, MiB
from aioengine.grammars.matching import Grammar, GrammarConstraint, Place
from aioengine.grammars.process import LOST, WorkerLost, WorkerProcess
from aioengine.grammars.wire import Compile, Compiled, Drop, Hello, numbers
from aioengine.tasks import Background, WorkInTurns, end_tasks

MEMORY_SECONDS = 0.5
"""Seconds between two looks at the memory of all grammars."""
MAX_COMPILES = 3
MAX_OF_A_TENANT = 2
"""Compiles at a time, of all tenants and of one."""
MAX_ENDS = 2
"""A text is refused after the worker has ended this often while it computed the text's masks."""

_STOPPED = "the engine was stopped, and guided decoding with it"

logger = logging.getLogger("aioengine")

Tenant = str | None


class Grammars:
    """Compiles grammars and keeps them, in a worker process.

    Args:
        tokenizer: Returns the content of the model's ``tokenizer.json``; called in a thread.
        vocab: Number of the model's logits.
        eos: Tokens that end an output.
        told: Called after each compile with its outcome ("compiled", "limit", "invalid" or "failed") and
            seconds of wall time.

    Nothing is started before it is needed. All methods are called on one loop.
    """

    def __init__(
        self,
        tokenizer: Callable[[], str],
        vocab: int,
        eos: Sequence[int],
        *,
        limits: GrammarLimits | None = None,
        told: Callable[[str, float], None] = lambda outcome, seconds: None,
    ) -> None:
        self.limits = GrammarLimits() if limits is None else limits
        self._tokenizer = tokenizer
        self._tokens = vocab, list(eos)
        self._told = told
        self._worker: WorkerProcess | None = None
        """The last one."""
        self._starting = asyncio.Lock()
        self._kept: OrderedDict[str, Grammar] = OrderedDict()
        """Grammars by text, the least recently used first."""
        self._compiles = WorkInTurns[str, Grammar](MAX_COMPILES, MAX_OF_A_TENANT)
        self._watch: asyncio.TimerHandle | None = None
        self._again = Background()
        """Compiles of texts that were lost."""
        self._is_closed = False

    @property
    def kept(self) -> int:
        """Number of compiled grammars."""
        return sum(grammar.place.worker.alive for grammar in self._kept.values())

    @property
    def waiting(self) -> int:
        """Number of texts that are being compiled or wait for it."""
        return len(self._compiles.shared.jobs)

    async def constraint(self, text: str, tenant: Tenant) -> GrammarConstraint:
        """Build a constraint for one request. If the call is cancelled and no other request waits for this
        text, the compile is stopped.

        Raises:
            RequestInvalid: The grammar is malformed, or takes more than its limits to compile.
            EngineOverloaded: Too many of the tenant's grammars wait to be compiled, or too many are in use.
            ConfigError: Guided decoding is not available for this model, or on this system.
            EngineStopped: The engine has stopped.
        """
        self.limits.check_characters((text,))
        if (grammar := self._usable(text)) is None:
            jobs = self._compiles.shared.jobs
            waiting = sum(owner == tenant for owner, _ in jobs)
            if waiting >= self.limits.max_queued and (tenant, text) not in jobs:
                raise EngineOverloaded(f"already {waiting} grammars wait to be compiled; try again later")
            grammar = await self._compiled(text, tenant)
            if not grammar.place.worker.alive:  # it may have no rows yet, and then it is not compiled again
                raise WorkerLost
        return GrammarConstraint(grammar, tenant)

    async def _compiled(self, text: str, tenant: Tenant) -> Grammar:
        return await self._compiles.result(tenant, text, lambda: self._in_turn(text))

    def _usable(self, text: str) -> Grammar | None:
        if self._is_closed:
            raise EngineStopped(_STOPPED)
        grammar = self._kept.get(text)
        if grammar is None or grammar.failure or not grammar.place.worker.alive:
            return None
        self._kept.move_to_end(text)
        return grammar

    # Compiling

    async def _in_turn(self, text: str) -> Grammar:
        """Compile the text, in a tenant's turn."""
        if (grammar := self._usable(text)) is not None:  # for another tenant, meanwhile
            return grammar
        grammar = self._kept.get(text)
        if grammar is not None and grammar.ends >= MAX_ENDS:
            raise RequestInvalid(grammar.failure or "")
        began = time.monotonic()
        worker, done = await self._compile(text)
        if done.outcome == "failed":  # perhaps not because of the grammar
            worker, done = await self._compile(text)
        self._told(done.outcome, time.monotonic() - began)
        if done.outcome == "failed":
            raise WorkerLost(done.why)
        if done.outcome != "compiled":
            raise RequestInvalid(f"the grammar {done.why}")
        grammar = self._kept.get(text)
        if grammar is None or grammar.failure:
            grammar = self._kept[text] = Grammar(text, self.limits.mask_wall_seconds)
        grammar.place, grammar.memory = Place(worker, done.number), done.memory
        self._kept.move_to_end(text)
        self._make_room()
        return grammar

    async def _compile(self, text: str) -> tuple[WorkerProcess, Compiled]:
        worker = await self._live_worker()
        number = next(numbers)
        try:
            return worker, await asyncio.wrap_future(worker.ask(Compile(number, text)))
        except WorkerLost:
            return worker, Compiled(number, "failed", LOST)
        except asyncio.CancelledError:
            worker.tell(Drop(number))
            raise

    async def _live_worker(self) -> WorkerProcess:
        loop = asyncio.get_running_loop()

        def lost(doing: int) -> None:
            loop.call_soon_threadsafe(self._lost, doing)

        async with self._starting:
            if self._worker is None or not self._worker.alive:
                tokenizer = await asyncio.to_thread(self._tokenizer)
                self._worker = await WorkerProcess.start(Hello(0, tokenizer, *self._tokens, self.limits))
                self._worker.on_loss = lost
            return self._worker

    def _lost(self, doing: int) -> None:
        """Compile the texts of the lost worker again that are in use. Requests go on: their outputs are
        known, and the new parsers follow them."""
        if self._is_closed:
            return
        logger.warning("the process that compiles and follows grammars was lost; it is started again")
        for text, grammar in list(self._kept.items()):
            if grammar.place.worker.alive:
                continue
            grammar.memory = 0
            grammar.ends += grammar.place.number == doing
            if grammar.ends >= MAX_ENDS:  # it is kept, so that it is refused
                grammar.fail("the grammar has ended the process that compiles and follows grammars")
            elif grammar.rows:
                self._again.spawn(self._compile_again(grammar), name="aioengine-grammars")
            else:
                del self._kept[text]

    async def _compile_again(self, grammar: Grammar) -> None:
        try:
            await self._compiled(grammar.text, next(iter(grammar.rows.values()), None))
        except AioEngineError as error:
            self._drop(grammar, str(error))

    # Keeping

    def _drop(self, grammar: Grammar, why: str) -> None:
        grammar.fail(why)
        if self._kept.get(grammar.text) is grammar:
            del self._kept[grammar.text]
        grammar.place.worker.tell(Drop(grammar.place.number))

    def _make_room(self) -> None:
        """Drop what is beyond the limits, now and from time to time: grammars grow with their parsers."""
        limits, kept = self.limits, self._kept
        for grammar in [each for each in kept.values() if each.memory > limits.memory]:
            self._drop(grammar, f"the grammar takes more than {limits.memory // MiB} MiB")
        # The last one may have been compiled just now for somebody.
        unused = deque(grammar for grammar in list(kept.values())[:-1] if not grammar.rows)
        while True:
            is_large = sum(grammar.memory for grammar in kept.values()) > limits.total_memory
            if unused and (is_large or len(kept) > limits.max_kept):
                self._drop(unused.popleft(), "it was not used")
            elif is_large:
                self._drop(
                    largest_of_most(kept.values()),
                    f"all grammars together took more than {limits.total_memory // MiB} MiB, and its "
                    "tenant's the most of them",
                )
            else:
                break
        if self._watch is not None:
            self._watch.cancel()
        loop = asyncio.get_running_loop()
        self._watch = loop.call_later(MEMORY_SECONDS, self._make_room) if kept else None

    async def close(self) -> None:
        """End the worker and wait for its end. Callers that wait for a compile get EngineStopped."""
        self._is_closed = True
        await end_tasks([*self._compiles.shared.close(EngineStopped(_STOPPED)), *self._again.tasks])
        if self._watch is not None:
            self._watch.cancel()
        for grammar in self._kept.values():
            grammar.fail(_STOPPED)
        if self._worker is not None:
            await self._worker.close()


def largest_of_most(grammars: Collection[Any]) -> Any:
    """Return the largest grammar of the tenant whose grammars take the most memory. A grammar's is divided
    among the tenants that use it."""
    taken = Counter[Tenant]()
    for grammar in grammars:
        users = set(grammar.rows.values())
        taken.update({tenant: grammar.memory // len(users) for tenant in users})

    def size(grammar: Any) -> tuple[int, int]:
        return max((taken[tenant] for tenant in grammar.rows.values()), default=0), grammar.memory

    return max(grammars, key=size)
