"""AsyncEngine: the engine as an asyncio application embeds it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from aioengine.adapter_ops import AdapterOps
from aioengine.adapters.loader import AdapterLoader
from aioengine.build import Parts, build_parts, core_limits
from aioengine.config import EngineConfig
from aioengine.core import Core
from aioengine.counters import Counters
from aioengine.errors import (
    AioEngineError,
    ConfigError,
    EngineStopped,
    PolicyError,
    RequestInvalid,
)
from aioengine.events import Event
from aioengine.executors.base import Executor
from aioengine.executors.thread import ThreadExecutor
from aioengine.info import AdapterInfo, EngineStats
from aioengine.memory_plan import MemoryPlan
from aioengine.request import Prompt, RequestOutput, SamplingParams
from aioengine.schedulers import SchedulerPolicy, load_policy
from aioengine.stepper import Stepper
from aioengine.stream import OutputStream
from aioengine.timing import DecisionTimer

if TYPE_CHECKING:
    from aioengine.metrics import EngineMetrics

LONG_TEXT = 4096
"""Prompts of more characters than this are tokenized in a thread, so that they do not hold up the loop."""


class AsyncEngine:
    """One base model with many adapters, on one event loop.

    >>> async with AsyncEngine(EngineConfig(model="smollm2-135m")) as engine:
    ...     await engine.load_adapter("sql", "path/to/peft_dir")
    ...     async for out in engine.generate("How many users?", adapter="sql"):
    ...         print(out.text_delta, end="")

    All methods must be called on the loop that the engine was entered on. Every coroutine may be
    cancelled at any point: a cancelled request gives back its KV blocks and its slot. Several engines
    can live in one process.

    Args:
        config: See :class:`~aioengine.config.EngineConfig`.
        policy: A policy instance, in place of the one that ``config.policy`` names.

    Raises:
        PolicyError: There is no such policy.
    """

    def __init__(self, config: EngineConfig, policy: SchedulerPolicy | None = None) -> None:
        if not isinstance(config, EngineConfig):
            raise ConfigError(f"config must be an EngineConfig, not {type(config).__name__}")
        if policy is None:
            try:
                policy = load_policy(config.policy)
            except ValueError as error:
                raise PolicyError(str(error)) from error
        elif not isinstance(policy, SchedulerPolicy):
            raise PolicyError(f"policy must be a SchedulerPolicy, not {type(policy).__name__}")
        self.config = config
        self._policy = policy
        self._state = "new"
        self._request_count = 0
        self._shutdown_task: asyncio.Task[None] | None = None
        self._counters = Counters()

    # Life cycle

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Load the model and begin; ``async with`` does it for you.

        Raises ConfigError if the model cannot be had, is not supported, or does not fit.
        """
        if self._state != "new":
            raise EngineStopped(f"the engine cannot be started again (it is {self._state})")
        self._state = "starting"
        work = ThreadPoolExecutor(1, thread_name_prefix="aioengine-work")
        try:
            parts, executor, loader = await asyncio.get_running_loop().run_in_executor(
                work, _build, self.config
            )
        except BaseException:
            self._state = "stopped"
            work.shutdown(wait=False)  # a thread that still loads ends by itself
            raise
        if self._state != "starting":  # stopped while the model was loaded
            await executor.close()
            loader.close()
            work.shutdown(wait=True)
            raise EngineStopped("the engine was stopped while it was starting")
        from aioengine.metrics import EngineMetrics  # prometheus_client is slow to import

        self._work = work
        self._executor: Executor = executor
        self._loader: AdapterLoader = loader
        self._parts: Parts = parts
        self._plan = parts.plan
        timer = DecisionTimer()
        self._core = Core(core_limits(self.config, parts), self._policy, timer=timer)
        self._stepper = Stepper(self._core, executor, loader, timer)
        self._adapters = AdapterOps(self._stepper, parts.plan.num_slots)
        self._metrics: EngineMetrics = EngineMetrics(
            max_adapter_labels=self.config.max_adapter_labels,
            snapshot=self.stats,
            adapters=self.adapters,
            engine=self.config.name,
            compat=self.config.metrics_compat,
        )
        self._stepper.listeners += [self._counters, self._metrics.handle]
        self._stepper.start()
        self._state = "running"

    async def stop(self) -> None:
        """End what runs (with EngineStopped) and free everything; ``async with`` does it for you."""
        if self._state in ("new", "starting", "stopped"):
            self._state = "stopped"  # a start under way notices
            return
        if self._shutdown_task is None:
            self._state = "stopping"
            self._shutdown_task = asyncio.get_running_loop().create_task(
                self._shutdown(), name="aioengine-shutdown"
            )
        try:
            await asyncio.shield(self._shutdown_task)
        except asyncio.CancelledError:
            await asyncio.wait([self._shutdown_task])  # nothing may be left behind
            raise

    async def _shutdown(self) -> None:
        await self._stepper.stop()
        await self._executor.close()
        self._loader.close()
        self._work.shutdown(wait=True)
        del self._executor, self._loader, self._parts, self._work
        self._state = "stopped"

    async def drain(self) -> None:
        """Accept nothing new, and wait until everything accepted has ended. If it is cancelled, the
        engine accepts requests again."""
        self._check_running()
        self._state = "draining"
        ended = asyncio.Event()

        def listen(_event: Event) -> None:
            if not self._core.requests:
                ended.set()

        remove = self.add_listener(listen)
        try:
            if self._core.requests:
                await ended.wait()
        except asyncio.CancelledError:
            if self._state == "draining":
                self._state = "running"
            raise
        finally:
            remove()

    # Requests

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        adapter: str | None = None,
        request_id: str | None = None,
        priority: int = 0,
        deadline: float | None = None,
        tenant: str | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Run one request; yields whenever there is something new, and at the end.

        Closing the iterator or cancelling the task aborts the request.

        Args:
            prompt: Text, token ids, or chat messages.
            params: How to sample; greedy, at most 256 tokens, by default.
            adapter: An adapter's name; None is the base model.
            request_id: Must be unique among those that have not ended; made up if None.
            priority: For policies that look at it; higher is more urgent.
            deadline: Seconds from now by which it must have ended.
            tenant: For policies that are fair between tenants.

        Raises:
            RequestInvalid: Empty or too long prompt, unknown token, request id in use, ...
            AdapterNotFound: No adapter of this name.
            AdapterInvalid, AdapterTooLarge, AdapterLoadError: It could not be loaded.
            EngineOverloaded: ``max_waiting`` requests wait already.
            DeadlineExceeded: The deadline passed.
            EngineStopped, EngineDead: The engine is not, or no longer, running.
        """
        stream = await self._submit(
            prompt,
            SamplingParams() if params is None else params,
            adapter=adapter,
            request_id=request_id,
            priority=priority,
            deadline=deadline,
            tenant=tenant,
        )
        try:
            while True:
                output = await stream.next()
                yield output
                if output.finished:
                    return
        finally:
            self._abandon(stream)

    async def complete(
        self, prompt: Prompt, params: SamplingParams | None = None, **kwargs: Any
    ) -> RequestOutput:
        """The last output of :meth:`generate`, with the same arguments and errors."""
        outputs = self.generate(prompt, params, **kwargs)
        try:
            async for output in outputs:
                last = output
        finally:
            await outputs.aclose()
        return last

    async def abort(self, request_id: str) -> bool:
        """End a request; its reader gets a last output with ``finish_reason="abort"``.

        Returns False if no such request is waiting or running.
        """
        self._check_started()
        request = self._core.requests.get(request_id)
        if request is None:
            return False
        self._core.end(request, "abort", _now())
        self._stepper.wake()
        return True

    async def _submit(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        adapter: str | None,
        request_id: str | None,
        priority: int,
        deadline: float | None,
        tenant: str | None,
    ) -> OutputStream:
        self._check_running()
        if not isinstance(params, SamplingParams):
            raise RequestInvalid(f"params must be SamplingParams, not {type(params).__name__}")
        _check_types(adapter, request_id, priority, deadline, tenant)
        made_up = False
        while request_id is None or (made_up and request_id in self._core.requests):
            made_up = True
            request_id = f"request-{self._request_count}"
            self._request_count += 1
        arrival = _now()
        if adapter is not None:
            self._adapters.find(adapter)  # before the work of tokenizing
        tokens = await self._tokenize(prompt)
        self._check_running()  # it may have changed while a long text was tokenized
        if request_id in self._core.requests:
            raise RequestInvalid(f"request_id={request_id!r} is in use by a request that has not ended")
        self._check_prompt(tokens)
        if params.stop and self._parts.tokenizer is None:
            raise RequestInvalid(f"stop={params.stop!r}: needs a tokenizer, and {self.config.model} has none")
        request = self._core.add_request(
            request_id,
            tokens,
            params,
            _now(),
            adapter=None if adapter is None else self._adapters.find(adapter),
            priority=priority,
            deadline=None if deadline is None else arrival + deadline,
            tenant=tenant,
        )
        text = None
        if self._parts.tokenizer is not None:
            text = self._parts.tokenizer.text_stream(params.skip_special_tokens, tuple(params.stop))
        stream = OutputStream(request, text)
        self._stepper.streams[request_id] = stream
        self._stepper.wake()
        return stream

    def _abandon(self, stream: OutputStream) -> None:
        """The reader is gone: abort the request if it has not ended."""
        if self._core.requests.get(stream.request.id) is stream.request:
            self._core.end(stream.request, "abort", _now())
            self._stepper.wake()

    async def _tokenize(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, list) and all(type(token) is int for token in prompt):
            return list(prompt)  # type: ignore[arg-type] # mypy does not narrow by all()
        tokenizer = self._parts.tokenizer
        if not isinstance(prompt, (str, list)):
            raise RequestInvalid(
                f"prompt must be str, list of token ids or list of messages, not {type(prompt).__name__}"
            )
        if tokenizer is None:
            raise RequestInvalid(
                f"{self.config.model} has no tokenizer.json: give the prompt as a list of token ids"
            )
        encode: Callable[[Any], list[int]] = (
            tokenizer.encode if isinstance(prompt, str) else tokenizer.encode_chat
        )
        if len(prompt) <= LONG_TEXT and isinstance(prompt, str):
            return encode(prompt)
        return await asyncio.get_running_loop().run_in_executor(self._work, encode, prompt)

    def _check_prompt(self, tokens: list[int]) -> None:
        limit = self._plan.max_model_len
        if not tokens:
            raise RequestInvalid("the prompt is empty: it must have at least one token")
        if len(tokens) >= limit:
            raise RequestInvalid(
                f"the prompt has {len(tokens)} tokens and max_model_len={limit} leaves no room for "
                "output: shorten it, or raise max_model_len"
            )
        vocab = self._parts.spec.vocab_size
        low, high = min(tokens), max(tokens)
        if low < 0 or high >= vocab:
            bad = low if low < 0 else high
            raise RequestInvalid(f"prompt token {bad} is outside the vocabulary 0..{vocab - 1}")

    # Adapters

    def register_adapter(self, name: str, path: str | os.PathLike[str]) -> AdapterInfo:
        """Declare an adapter that is read when a request first needs it. No I/O.

        Raises AdapterInvalid for a bad name, or if the name stands for another path already.
        """
        self._check_lora()
        return self._adapters.register(name, path)

    async def load_adapter(
        self,
        name: str,
        path: str | os.PathLike[str] | None = None,
        *,
        pin: bool = False,
        replace: bool = False,
    ) -> AdapterInfo:
        """Read and validate an adapter and bring it to the CPU cache.

        With ``replace`` it takes the place of the one of this name: requests accepted before finish on
        the old version, those after run on the new; if it turns out to be bad the old one stays.
        With ``pin`` it goes to a slot and stays there. ``path`` may be left out for a registered name.

        Raises AdapterInvalid, AdapterTooLarge, AdapterLoadError; AdapterNotFound without ``path`` for
        an unknown name; ConfigError if ``pin`` would leave no slot for the others.
        """
        self._check_lora()
        return await self._adapters.load(name, path, pin=pin, replace=replace)

    async def unload_adapter(self, name: str, *, force: bool = False) -> None:
        """Take no new requests for it, wait for those accepted (with ``force``: abort them), and free
        its slot and CPU memory. Raises AdapterNotFound."""
        self._check_lora()
        await self._adapters.unload(name, force=force)

    async def pin_adapter(self, name: str) -> AdapterInfo:
        """Keep it in a slot whatever happens. At most ``max_loras - 1`` adapters can be pinned.

        Raises AdapterNotFound, ConfigError, or what loading it raises.
        """
        self._check_lora()
        return await self._adapters.pin(name)

    async def unpin_adapter(self, name: str) -> AdapterInfo:
        """Let it be evicted again. Raises AdapterNotFound."""
        self._check_lora()
        return await self._adapters.unpin(name)

    def adapters(self) -> list[AdapterInfo]:
        """Every registered adapter as it stands now."""
        self._check_started()
        return self._adapters.list()

    # Watching

    def stats(self) -> EngineStats:
        """The engine as it stands now."""
        self._check_started()
        return self._counters.snapshot(self._core)

    def add_listener(self, listener: Callable[[Event], None]) -> Callable[[], None]:
        """Have every event delivered to ``listener``, on the loop; returns what removes it.

        A listener must be quick. What it raises is logged and goes no further.
        """
        self._check_started()
        listeners = self._stepper.listeners
        listeners.append(listener)
        return lambda: listeners.remove(listener)

    @property
    def metrics(self) -> EngineMetrics:
        """Prometheus metrics, in a registry of this engine's own (``engine.metrics.registry``)."""
        self._check_started()
        return self._metrics

    @property
    def plan(self) -> MemoryPlan:
        """What was allocated."""
        self._check_started()
        return self._plan

    def check_invariants(self) -> None:
        """Assert the core's invariants; for tests and for the suspicious."""
        self._check_started()
        self._core.check()

    def _check_started(self) -> None:
        if self._state in ("new", "starting"):
            raise EngineStopped("the engine is not started: use 'async with AsyncEngine(...)'")

    def _check_running(self) -> None:
        self._check_started()
        if self._stepper.dead is not None:
            raise self._stepper.dead
        if self._state != "running":
            raise EngineStopped(f"the engine accepts nothing new: it is {self._state}")

    def _check_lora(self) -> None:
        self._check_running()
        if self.config.lora is None:
            raise ConfigError("lora=None: this engine was configured without adapters")


def _build(config: EngineConfig) -> tuple[Parts, Executor, AdapterLoader]:
    parts = build_parts(config)
    executor = ThreadExecutor(parts.runner)
    threads = 1 if config.lora is None else config.lora.max_concurrent_loads
    return parts, executor, AdapterLoader(parts.store, executor, max_concurrent=threads)


def _check_types(
    adapter: object, request_id: object, priority: object, deadline: object, tenant: object
) -> None:
    """Refuse here what would make trouble, for everybody, further in."""
    for field, value in (("adapter", adapter), ("request_id", request_id), ("tenant", tenant)):
        if value is not None and (not isinstance(value, str) or not value):
            raise RequestInvalid(f"{field}={value!r}: must be a non-empty str, or None")
    if isinstance(priority, bool) or not isinstance(priority, int):
        raise RequestInvalid(f"priority={priority!r}: must be an integer")
    if deadline is not None:
        number = isinstance(deadline, (int, float)) and not isinstance(deadline, bool)
        if not number or not deadline > 0:  # type: ignore[operator] # a number by then
            raise RequestInvalid(f"deadline={deadline!r}: must be more than 0 seconds from now")


def _now() -> float:
    return asyncio.get_running_loop().time()


__all__ = ["AioEngineError", "AsyncEngine"]
