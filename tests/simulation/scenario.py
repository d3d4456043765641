"""A scenario: an engine, what is asked of it and what goes wrong, all drawn from one seed."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, NamedTuple

from simulation.checker import Call, Checker
from simulation.faults import MAX_RANK, FaultyDevice, Memory, Rates
from support.hostile_policies import Failing, Hostile, Slow
from support.lab_sim import MB, costs

from aioengine import EngineConfig, LoRAConfig, SamplingParams, events
from aioengine.errors import AioEngineError, EngineDead, RequestInvalid
from aioengine.lab.costs.model import Stage
from aioengine.lab.simulation.clock import NothingToWaitFor, VirtualTimeLoop
from aioengine.lab.simulation.engine import SimulatedEngine
from aioengine.schedulers import SchedulerPolicy, available_policies, load_policy

NAMES = ("a", "b", "c", "d", "e")
PATIENCE = 400.0
"""Seconds of virtual time, beside those that the clock jumps, after which a run hangs."""
MAX_TURNS = 20_000
"""Turns of the loop at one and the same time after which it hangs."""
MODEL = costs(disk=Stage(latency=0.05, bandwidth=MB), slot=Stage(latency=0.02, bandwidth=10 * MB))


class Found(AssertionError):
    """Something that must never happen has happened."""


class TimeStandsStill(Exception):
    """The loop turns and turns."""


class Planned(NamedTuple):
    """A request to come."""

    time: float
    adapter: str | None
    prompt: list[int]
    max_tokens: int
    length: int
    """Where its output would end by itself."""
    deadline: float | None
    tenant: str | None
    priority: int
    how: str
    patience: float | None
    """Seconds after which its caller goes away."""


class GuardedLoop(VirtualTimeLoop):
    """Raises where a run would never end, because time stands still."""

    turns = 0
    as_of = 0.0

    def _run_once(self) -> None:
        now = self.time()
        self.turns = self.turns + 1 if now == self.as_of else 0
        self.as_of = now
        if self.turns > MAX_TURNS:
            self.turns = 0
            raise TimeStandsStill(f"at {now:g} s the loop turns and turns, and no time passes")
        super()._run_once()  # type: ignore[misc]

    def jump(self, seconds: float) -> None:
        """As if the machine had been asleep."""
        self._jumping.now += seconds


class FaultyEngine(SimulatedEngine):
    def __init__(self, config: EngineConfig, policy: SchedulerPolicy, **parts: Any) -> None:
        super().__init__(config, MODEL, policy)
        assert config.lora is not None
        self._device = FaultyDevice(
            MODEL, end_token=self._end_token, lora=config.lora, seed=config.seed, **parts
        )


class Scenario:
    """Everything is drawn in ``__init__``, but what depends on the run (faults at reads, steps and copies)
    is drawn as it comes, in the order of events, which the seed decides as well."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rng = rng = random.Random(seed)
        self.planned = self._requests()
        self.end = self.planned[-1].time
        self.rates = self._rates()
        slots = rng.choice([1, 2, 2, 3])
        cpu = slots + rng.choice([0, 0, 1, 3])
        block_size = rng.choice([4, 16])
        max_len = rng.choice([48, 64])
        spare = rng.choice([0, 2, 100, 100]) if block_size == 16 else rng.choice([0, 8, 300])
        blocks = -(-max_len // block_size) + spare
        seqs = rng.choice([1, 3, 6])
        largest = MODEL.adapter_nbytes(MAX_RANK)
        block_bytes = block_size * MODEL.spec.kv_bytes_per_token(2)
        kv_cache_memory = blocks * block_bytes
        # Drawn apart, so that it leaves what else a seed means as it is.
        own = random.Random(f"memory {seed}")
        slot_memory: int | str | None = own.choice([None, None, None, None, "bytes", "bytes", "bytes"])
        if slot_memory == "bytes":
            slot_memory = own.choice([largest, int(1.6 * largest), 3 * largest])
        if slot_memory is not None:  # more adapters than would fit if all were large
            more = own.choice([1, 3])
            slots, cpu = slots + more, cpu + more
        cpu_bytes = rng.choice([None, None, int(1.1 * largest), int(2.2 * largest)])
        if cpu_bytes is not None and isinstance(slot_memory, int):
            cpu_bytes = max(cpu_bytes, slot_memory)
        self.config = EngineConfig(
            model="simulated",
            max_model_len=max_len,
            max_num_seqs=seqs,
            max_num_batched_tokens=seqs + rng.choice([0, 5, 20, 100]),
            block_size=block_size,
            kv_cache_memory=kv_cache_memory,
            enable_prefix_caching=rng.random() < 0.7,
            max_waiting=rng.choice([None, None, 2, 8]),
            seed=seed,
            max_adapter_labels=rng.choice([3, 20]),
            lora=LoRAConfig(
                max_loras=slots,
                max_lora_rank=MAX_RANK,
                slot_memory=slot_memory,
                max_cpu_loras=cpu,
                max_cpu_lora_bytes=cpu_bytes,
                max_concurrent_loads=rng.choice([1, 2, 4]),
                load_retries=rng.choice([0, 2, 3]),
                load_timeout=rng.choice([None, 0.3, 2.0, 60.0]),
            ),
        )
        self.policy_name, self.policy = self._policy()
        self.restarts = rng.random() < 0.5
        self.ending = rng.choice(["all", "all", "all", "all", "drain", "stop"])
        self.registered = rng.choice([3, 5, 5, 5])
        self.actions = self._actions()
        self.jumped = 0.0
        self.calls: list[Call] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.paths = 0
        self.log: list[events.Event] = []

    # Drawing

    def _requests(self) -> list[Planned]:
        rng = self.rng
        time, planned = 0.0, []
        busy = rng.choice([0.02, 0.05, 0.2])
        shared = [[rng.randrange(900) for _ in range(30)] for _ in range(2)]
        popular = rng.choices(NAMES, k=3)
        for _ in range(rng.randint(5, 25)):
            time += rng.choice([0.0, rng.expovariate(1 / busy)])
            prompt = rng.choice(shared)[: rng.randint(1, 30)]
            prompt = prompt + [rng.randrange(900) for _ in range(rng.choice([0, 0, 1, 8]))]
            planned.append(
                Planned(
                    time,
                    rng.choice([None, *popular, *NAMES]),
                    prompt,
                    max_tokens=rng.choice([1, 6, 12, 40]),
                    length=rng.randint(1, 30),
                    deadline=rng.choice([None] * 5 + [0.1, 1.0, 5.0]),
                    tenant=rng.choice([None, "x", "y", "z"]),
                    priority=rng.randint(-2, 2),
                    how=rng.choice(["complete", "complete", "generate", "generate", "close"]),
                    patience=rng.choice([None] * 6 + [0.0, rng.uniform(0.0, 2.0)]),
                )
            )
        return planned

    def _rates(self) -> Rates:
        """Most kinds of faults do not happen in a scenario at all, and some happen often; now and then there
        is none but what callers and policy do."""
        rng = self.rng
        if rng.random() < 0.2:
            return Rates()

        def rate(often: float) -> float:
            return rng.choice([0.0, 0.0, often / 4, often])

        return Rates(
            slow_read=rate(0.4),
            hanging_read=rate(0.3),
            passing_read=rate(0.6),
            failed_read=rate(0.3),
            bad_adapter=rate(0.3),
            slow_copy=rate(0.4),
            failed_copy=rate(0.4),
            failed_row=rate(0.05),
            slow_step=rate(0.1),
            lethal_step=rng.choice([0.0] * 9 + [0.01]),
        )

    def _policy(self) -> tuple[str, SchedulerPolicy]:
        """A built-in one, whole or out of parts, and now and then one that is worse."""
        rng = self.rng
        kinds: dict[str, list[str]] = {}
        for info in available_policies().values():
            kinds.setdefault(info.kind, []).append(info.name)
        if rng.random() < 0.4:
            name = rng.choice(kinds["policy"])
        else:
            parts = [rng.choice(kinds["order"]), rng.choice(kinds["replace"]), rng.choice(kinds["prefetch"])]
            name = "+".join(part for part in parts if rng.random() < 0.8) or "lru"
        future = [(request.time, request.adapter) for request in self.planned if request.adapter is not None]
        policy = load_policy(name, supply={"future": lambda: future, "start": lambda: 0.0})
        match rng.choice(["", "", "", "hostile", "failing", "slow"]):
            case "hostile":
                return "hostile", Hostile(self.seed)
            case "failing":
                return f"failing {name}", Failing(policy, self.seed)
            case "slow":
                return f"slow {name}", Slow(policy, self._overrun)
        return name, policy

    def _overrun(self) -> None:
        if self.rng.random() < 0.2:
            self._jump(0.03)

    def _actions(self) -> list[tuple[float, str]]:
        """(time, kind) of what is done beside the requests."""
        rng = self.rng
        kinds = ["load", "load", "replace", "replace", "unload", "unload", "pin", "pin", "unpin", "unpin"]
        kinds += ["register", "abort", "abort", "again"]
        chosen = rng.choices(kinds, k=rng.randint(0, 25))
        chosen += [kind for kind in ("jump", "lose", "drain a little") if rng.random() < 0.2]
        return sorted((rng.uniform(0.0, self.end + 2.0), kind) for kind in chosen)

    # Running

    def run(self) -> list[events.Event]:
        """The event log. Raises Found."""
        logging.disable(logging.CRITICAL)  # hundreds of planned errors
        try:
            with asyncio.Runner(loop_factory=GuardedLoop) as runner:
                return runner.run(self._main())
        except (TimeStandsStill, NothingToWaitFor) as error:
            raise Found(self._describe(str(error))) from error
        finally:
            logging.disable(logging.NOTSET)

    async def _main(self) -> list[events.Event]:
        loop = asyncio.get_running_loop()
        first: asyncio.Future[str] = loop.create_future()

        def problem(text: str) -> None:
            if not first.done():
                first.set_result(f"at {loop.time():g} s: {text}")

        def watched(loop: asyncio.AbstractEventLoop, coro: Any, **named: Any) -> asyncio.Task[Any]:
            task = asyncio.Task(coro, loop=loop, **named)
            task.add_done_callback(check)
            return task

        def check(task: asyncio.Task[Any]) -> None:
            engines = ("aioengine-load", "aioengine-copy", "aioengine-loop", "aioengine-stop")
            if not task.cancelled() and task.exception() is not None and task.get_name().startswith(engines):
                problem(f"task {task.get_name()} failed: {task.exception()!r}")

        loop.set_task_factory(watched)
        loop.set_exception_handler(lambda _, context: problem(f"unhandled: {context}"))
        self.problem = problem
        main = asyncio.current_task()
        assert main is not None
        main.set_name("main")
        running = loop.create_task(self._live(), name="scenario")
        await asyncio.wait([running, first], return_when=asyncio.FIRST_COMPLETED)
        loop.set_exception_handler(lambda _, context: None)
        if not first.done():
            try:
                running.result()
            except AssertionError as error:
                problem(str(error))
        if first.done():
            raise Found(self._describe(first.result()))
        return self.log

    def _describe(self, problem: str) -> str:
        telling = [event for event in self.log if not isinstance(event, events.LoopLag)]
        last = "\n".join(f"  {event}" for event in telling[-25:])
        return (
            f"seed {self.seed}, policy {self.policy_name}: {problem}\nlast events:\n{last}\n"
            f"again: AIOENGINE_FUZZ_SEED={self.seed} python -m pytest tests/simulation"
        )

    async def _live(self) -> None:
        lora = self.config.lora
        assert lora is not None
        memory = Memory(lora.max_loras, self.config.block_size, self.problem)
        self.engine = engine = FaultyEngine(
            self.config,
            self.policy,
            memory=memory,
            rates=self.rates,
            rng=random.Random(f"faults {self.seed}"),
            restarts=self.restarts,
            version_of=lambda request_id: self.checker.version_of(request_id),
        )
        await engine.start()
        self.checker = Checker(engine, self.problem)
        self.checker.forced_pins = lora.slot_memory is not None  # pins are bounded by number, not by bytes
        self.log = self.checker.log
        engine.add_listener(self.checker)
        for name in NAMES[: self.registered]:
            engine.register_adapter(name, self._path(name))
        await self._play()
        await self._within(self._finish(), "the end")

    async def _play(self) -> None:
        """Do everything at its time."""
        loop = asyncio.get_running_loop()
        todo: list[tuple[float, Callable[[], None]]] = []
        for index, planned in enumerate(self.planned):
            todo.append((planned.time, lambda index=index, planned=planned: self._send(index, planned)))
        for index, (time, kind) in enumerate(self.actions):
            todo.append((time, lambda index=index, kind=kind: self._act(index, kind)))
        todo.sort(key=lambda item: item[0])
        if self.ending != "all":
            todo = todo[: self.rng.randint(len(todo) // 2, len(todo))]
        for time, do in todo:
            if time > loop.time():
                await asyncio.sleep(time - loop.time())
            do()

    def _spawn(self, work: Awaitable[None], name: str, patience: float | None) -> asyncio.Task[None]:
        loop = asyncio.get_running_loop()
        task = loop.create_task(work, name=name)  # type: ignore[arg-type]
        self.tasks.append(task)
        if patience is not None:
            loop.call_later(patience, task.cancel)
        return task

    def _jump(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, GuardedLoop)
        self.jumped += seconds
        loop.jump(seconds)

    # Requests

    def _send(self, index: int, planned: Planned) -> None:
        call = Call(f"r{index}")
        self.calls.append(call)
        self.engine.lengths[call.request_id] = planned.length
        task = self._spawn(self._request(call, planned), f"request {index}", planned.patience)

        def done(_: asyncio.Task[None]) -> None:
            if task.cancelled():
                call.left = True
            elif (error := task.exception()) is not None:
                self.problem(f"{call.request_id}: {type(error).__name__}: {error}")
                return
            try:
                self.checker.check_call(call, self.engine._end_token)
            except AssertionError as error:
                self.problem(str(error))

        task.add_done_callback(done)

    async def _request(self, call: Call, planned: Planned) -> None:
        named: dict[str, Any] = {
            "adapter": planned.adapter,
            "request_id": call.request_id,
            "priority": planned.priority,
            "deadline": planned.deadline,
            "tenant": planned.tenant,
        }
        params = SamplingParams(max_tokens=planned.max_tokens)
        try:
            if planned.how == "complete":
                call.outcome = await self.engine.complete(planned.prompt, params, **named)
                return
            tokens: list[int] = []
            outputs = self.engine.generate(planned.prompt, params, **named)
            async for output in outputs:
                tokens += output.token_ids_delta
                assert tokens == list(output.token_ids), "what comes bit by bit is not the whole"
                call.outcome = output
                if planned.how == "close" and len(tokens) >= 3 and not output.finished:
                    call.left = True
                    await outputs.aclose()
                    return
        except AioEngineError as error:
            call.outcome = error

    # What is done beside them

    def _act(self, index: int, kind: str) -> None:
        rng, engine = self.rng, self.engine
        name = rng.choice(NAMES)
        force = rng.random() < 0.3
        match kind:
            case "jump":
                self._jump(rng.choice([5.0, 90.0, 3600.0]))
                return
            case "lose":
                engine._device.lose()  # type: ignore[attr-defined]
                return
            case "load":
                known = rng.random() < 0.5
                work = engine.load_adapter(name, None if known else self._path(name), pin=force)
            case "replace":
                known = rng.random() < 0.2
                work = engine.load_adapter(name, None if known else self._path(name), replace=True, pin=force)
            case "unload":
                work = engine.unload_adapter(name, force=force)  # type: ignore[assignment]
            case "pin":
                self.checker.forced_pins |= force
                work = engine.pin_adapter(name, force=force)
            case "unpin":
                work = engine.unpin_adapter(name)
            case "register":
                with suppress(AioEngineError):
                    engine.register_adapter(name, self._path(name))
                return
            case "abort":
                work = engine.abort(f"r{rng.randrange(len(self.planned))}")  # type: ignore[assignment]
            case "again":
                work = self._again()  # type: ignore[assignment]
            case _:
                work = engine.drain()  # type: ignore[assignment]
        patience = rng.uniform(0.0, 1.0) if kind == "drain a little" or rng.random() < 0.3 else None
        self._spawn(self._operation(work, kind), f"{kind} {index}", patience)

    async def _operation(self, work: Awaitable[object], kind: str) -> None:
        """It succeeds, or raises an error of the engine's."""
        try:
            await work
        except AioEngineError:
            return
        except Exception as error:
            self.problem(f"{kind} raised {type(error).__name__}: {error}")

    async def _again(self) -> None:
        """An id that is in use is refused."""
        taken = next(iter(self.engine._core.requests), None)
        if taken is not None and self.engine.state == "running":
            try:
                await self.engine.complete([1], request_id=taken)
            except RequestInvalid:
                return
            self.problem(f"{taken} was accepted though it is in use")

    def _path(self, name: str) -> str:
        """Every version is from a folder of its own, and so has contents of its own."""
        self.paths += 1
        return f"/simulated/{name}/{self.paths}"

    # The end

    async def _finish(self) -> None:
        engine, checker = self.engine, self.checker
        if self.policy_name == "hostile":
            asyncio.get_running_loop().call_later(60.0, self._abort_all)
        if self.ending == "stop":
            checker.stopped = True
            await engine.stop()
        elif self.ending == "drain":
            with suppress(AioEngineError):
                await engine.drain()
        if self.tasks:
            await asyncio.wait(self.tasks)
        while engine.state == "running" and engine._core._zombies:  # a step in flight has their blocks
            await asyncio.sleep(0.01)
        if engine.state == "running":
            checker.check_rest(len(self.calls))
            await self._unload_all()
        checker.stopped = True
        await engine.stop()
        checker.check_rest(len(self.calls))
        checker.check_tasks()
        dead = engine._loop.dead
        assert dead is None or self.killed, f"the engine died: {dead!r}, of {dead.__cause__!r}"

    @property
    def killed(self) -> bool:
        device = self.engine._device
        assert isinstance(device, FaultyDevice)
        return device.killed

    def _abort_all(self) -> None:
        for request in list(self.engine._core.requests.values()):
            self.engine._loop.abort(request)

    async def _unload_all(self) -> None:
        engine = self.engine
        try:
            for info in engine.adapters():
                await engine.unload_adapter(info.name)
            while engine._core.residency.entries:  # those that were given up or replaced, a little later
                await asyncio.sleep(0.1)
        except EngineDead:
            assert self.killed
            return
        await asyncio.sleep(0)  # reads that were given up end
        self.checker.check_empty()

    async def _within(self, work: Awaitable[None], what: str) -> None:
        """A run that is not done by then hangs."""
        loop = asyncio.get_running_loop()
        task = loop.create_task(work, name="scenario")  # type: ignore[arg-type]
        until = loop.time() + PATIENCE
        while not task.done():
            jumped = self.jumped
            await asyncio.wait([task], timeout=max(until - loop.time(), 0.0))
            until += self.jumped - jumped
            if not task.done() and loop.time() >= until:
                waiting = [task.get_name() for task in self.tasks if not task.done()]
                raise Found(f"{what} does not come; those wait: {waiting}; {self.engine.stats()}")
        task.result()


def run(seed: int) -> list[events.Event]:
    """The event log of a seed's scenario. Raises Found if something happens in it that must not."""
    return Scenario(seed).run()
