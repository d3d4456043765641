"""AsyncEngine: the engine as an asyncio application embeds it. Here are its life cycle, settings and state;
its requests are in ``runtime/submit.py``, its adapters in ``runtime/adapters.py``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import msgspec

from aioengine import __version__
from aioengine.adapters.peft.held import HeldAdapters
from aioengine.adapters.read_threads import SharedRead
from aioengine.adapters.resolvers.base import AdapterResolver
from aioengine.config import WAITING_BOUNDS, EngineConfig
from aioengine.core import Core
from aioengine.errors import ConfigError, EngineDead, EngineStopped
from aioengine.events import Event
from aioengine.executors.warm_up import warm_up
from aioengine.info import EngineInfo, EngineState, EngineStats, LoadProgress
from aioengine.model.pooling import read_label_names
from aioengine.runtime import assemble
from aioengine.runtime.adapters import AdapterOps
from aioengine.runtime.loop import EngineLoop
from aioengine.runtime.sources.mixes import Mixes
from aioengine.runtime.sources.names import AdapterNames
from aioengine.runtime.stats import Counters
from aioengine.runtime.text_work import TextWork
from aioengine.schedulers import SchedulerPolicy
from aioengine.tasks import run_to_completion

if TYPE_CHECKING:
    from aioengine.grammars.limits import GrammarLimits
    from aioengine.grammars.service import Grammars
    from aioengine.metrics import EngineMetrics


class AsyncEngine(AdapterOps):
    """One base model with many adapters, on one event loop.

    >>> async with AsyncEngine(EngineConfig(model="smollm2-135m")) as engine:
    ...     await engine.load_adapter("sql", "path/to/peft_dir")
    ...     async for out in engine.generate("How many users?", adapter="sql"):
    ...         print(out.text_delta, end="")

    All methods belong to the loop that the engine was entered on. Every coroutine may be cancelled at any
    point. ``policy`` is used in place of the one that ``config.policy`` names. ``resolver`` is asked for
    adapters that are not registered; None: those below ``config.lora.adapter_root``. Raises ConfigError for
    an argument of another type, and PolicyError if there is no such policy.
    """

    metrics: EngineMetrics
    """Prometheus metrics of this engine, in a registry of its own (``engine.metrics.registry``)."""
    info: EngineInfo
    model_path: Path | None
    """The folder or GGUF file that the model was read from; None if there is none."""

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> object:
            if any(name in getattr(kind, "__annotations__", ()) for kind in type(self).__mro__):
                raise EngineStopped("the engine is not started: use 'async with AsyncEngine(...)'")
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __init__(
        self,
        config: EngineConfig,
        policy: SchedulerPolicy | None = None,
        resolver: AdapterResolver | None = None,
    ) -> None:
        if not isinstance(config, EngineConfig):
            raise ConfigError(f"config must be an EngineConfig, not {type(config).__name__}")
        if resolver is not None and not isinstance(resolver, AdapterResolver):
            raise ConfigError(f"resolver must be an AdapterResolver, not {type(resolver).__name__}")
        self.config = config
        self.model_name = config.model_name
        """Name of the base model in requests and metrics; a server sets it to the name that it serves."""
        self.leaving = False
        """Set by a server that is about to stop; ``state`` is then "draining"."""
        self._policy = assemble.choose_policy(config, policy)
        self._resolver = resolver
        self._state: EngineState = "new"
        self._shutdown_task: asyncio.Task[None] | None = None
        self._counters = Counters()
        self._numbers = count()
        # Not read in the engine's own thread, which is waited for at the end: the disk may hang.
        self.label_names = SharedRead("aioengine-labels", lambda: read_label_names(self.model_path))
        self._closers: list[Callable[[], Awaitable[None]]] = []
        self.text_work = TextWork()
        """Runs tokenization and detokenization; servers of this engine use it too."""

    # Life cycle

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    async def start(self, *, progress: LoadProgress | None = None) -> None:
        """Load the model and begin. Raises ConfigError if the model is not available, not supported, or does
        not fit."""
        if self._state != "new":
            raise EngineStopped(f"the engine cannot be started again (it is {self._state})")
        self._state = "starting"
        work = ThreadPoolExecutor(1, thread_name_prefix="aioengine-work")
        try:
            built = await self._build(work, progress)
        except BaseException:
            self._state = "stopped"
            work.shutdown(wait=False)  # a thread that still loads ends by itself
            raise
        if self.state != "starting":  # stopped while the model was loaded
            await built.device.close()
            work.shutdown(wait=True)
            raise EngineStopped("the engine was stopped while it was starting")
        from aioengine.metrics import EngineMetrics  # prometheus_client is slow to import

        self._built: assemble.Built = built
        self.plan, self.tokenizer = built.plan, built.tokenizer
        self.model_spec, self.model_path = built.spec, built.model_path
        self.info = assemble.engine_info(__version__, self.config, built)
        timer = asyncio.get_running_loop().time if built.virtual else time.perf_counter
        self._core = Core(
            assemble.core_limits(self.config, built),
            self._policy,
            timer=timer,
            processor=None if built.virtual else time.thread_time,
            costs=built.costs,
            repeats=built.device.repeats,
        )
        for batch, seconds in built.first_steps:
            self._core.learn(batch, seconds)
        self._loop = EngineLoop(
            self._core, built.device, timer=timer, virtual=built.virtual, intervals=built.metrics
        )
        lora = self.config.lora
        self._names = AdapterNames(self._loop, built.resolver, None if lora is None else lora.load_timeout)
        self._mixes = Mixes(self._names, self._core.residency)
        self._held = HeldAdapters(work, int(lora.max_held_lora_bytes) if lora else 0)
        self.metrics = EngineMetrics(
            max_adapter_labels=self.config.max_adapter_labels,
            snapshot=self.stats,
            adapters=self._busy,
            engine=self.config.name,
            compat=self.config.metrics_compat,
            model_name=lambda: self.model_name,
            state=lambda: "degraded" if self.degraded else self.state,
            build=self.info,
        )
        self._loop.listeners.add(self._counters, *self._counters.COUNTED)
        if built.metrics:
            self._loop.listeners.add(self.metrics.handle)
        self._loop.start()
        self._state = "running"

    async def _build(self, work: ThreadPoolExecutor, progress: LoadProgress | None) -> assemble.Built:
        """Build the engine's parts; the policy lab overrides it."""
        built = await assemble.build(self.config, self._resolver, progress, work)
        try:
            first_steps = await warm_up(built.device, built.plan, self.config)
        except BaseException:
            await built.device.close()
            raise
        return built._replace(first_steps=first_steps)

    async def stop(self) -> None:
        """End all requests (with EngineStopped) and free everything."""
        if self._state in ("new", "starting", "stopped"):
            self._state = "stopped"  # a start under way notices
            return
        if self._shutdown_task is None:
            self._state = "stopping"
            self._shutdown_task = asyncio.ensure_future(self._shutdown())
        await run_to_completion(self._shutdown_task)  # no thread or process may be left behind

    async def _shutdown(self) -> None:
        self._names.lookups.close(EngineStopped("the engine was stopped while the adapter was looked for"))
        await self._loop.stop()
        for close in self._closers:
            await close()
        await self._built.device.close()
        await self.text_work.close()  # or else the next line would hold up the loop
        self._held.close()
        del self._built
        self._state = "stopped"

    async def drain(self) -> None:
        """Accept no new requests, unless this is cancelled, and wait until all accepted ones have ended."""
        self._check_running()
        self._state = "draining"
        try:
            await self._loop.until(lambda: not self._core.requests)
        except asyncio.CancelledError:
            if self._state == "draining":
                self._state = "running"
            raise

    # Settings

    def limit_waiting(self, max_waiting: Mapping[str, int]) -> None:
        """Set bounds on waiting requests of single tenants, in place of ``max_waiting_per_tenant``."""
        self._core.room.max_of_tenant = dict(max_waiting)

    def share_limits(self, ledger: object) -> None:
        """Do nothing: only the gateways of a fleet share the limits of a server's keys."""

    def change_settings(self, **changes: Any) -> None:
        """Change fields of the configuration: ``policy``, from the next step on, and the bounds on waiting
        requests (``config.WAITING_BOUNDS``), for new ones. Raises ConfigError or PolicyError, and changes
        nothing, if one is not valid."""
        config = msgspec.structs.replace(self.config, **changes)
        if "policy" in changes:
            self._core.guard.change(assemble.choose_policy(config, None))
        bounds = {name: changes[name] for name in WAITING_BOUNDS if name in changes}
        self._core.room.limits = self._core.room.limits._replace(**bounds)
        self.config = config
        self._loop.wake()

    # Watching

    def stats(self) -> EngineStats:
        """Return the engine's present state; after its stop, its last state."""
        return self._counters.snapshot(self._core, self._loop.listeners.failures)

    def add_listener(self, listener: Callable[[Event], None], *types: type[Event]) -> Callable[[], None]:
        """Deliver every event to ``listener``, or those of the given types, on the loop; returns a function
        that ends this. A listener must be quick; its exceptions are logged. Raises ConfigError for a type
        that is none of :mod:`aioengine.events`."""
        return self._loop.listeners.add(listener, *types)

    @property
    def state(self) -> EngineState:
        """State of its life cycle; only a "running" engine accepts requests."""
        if self._state == "running" and self._loop.dead is not None:
            return "dead"
        return "draining" if self._state == "running" and self.leaving else self._state

    @property
    def degraded(self) -> bool:
        """Whether the model's processes were lost and are being restarted; requests wait."""
        return self.state == "running" and self._loop.restarting is not None

    @property
    def failure(self) -> EngineDead | None:
        """Why it is dead or degraded; None if it is neither."""
        return self._loop.dead or (self._loop.restarting if self.degraded else None)

    def step_age(self) -> float:
        """Return the seconds since the step that runs now began; 0 if none does."""
        return self._loop.step_age()

    async def until_dead(self) -> EngineDead:
        """Wait until the engine is dead, and return why. If it is stopped instead, this does not return."""
        return await self._loop.until_dead()

    def grammars(self, limits: GrammarLimits | None = None) -> Grammars:
        """Return a compiler of grammars for this model, which has a tokenizer, for
        :class:`~aioengine.guided.Guide`. It ends with the engine."""
        self._check_running()
        from aioengine.grammars.service import Grammars

        assert self.tokenizer is not None
        grammars = Grammars(
            self.tokenizer.to_json,
            self.model_spec.vocab_size,
            self.model_spec.eos_token_ids,
            limits=limits,
            told=self.metrics.grammar_compiled,
        )
        self.metrics.grammars_kept.append(lambda: grammars.kept)
        self._closers.append(grammars.close)
        return grammars

    def check_invariants(self) -> None:
        """Assert the core's invariants; for tests and debugging."""
        self._core.check()
