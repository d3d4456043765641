"""Plays a workload on an engine, live or simulated, and records what comes of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from aioengine.engine import AsyncEngine
from aioengine.errors import AioEngineError, ConfigError, EngineDead, EngineStopped
from aioengine.lab.calibration.live import LiveRequests
from aioengine.lab.runs.recorder import Recorder
from aioengine.lab.runs.rows import Sink
from aioengine.lab.simulation.engine import TOKEN, SimulatedEngine
from aioengine.lab.workload.requests import Arrival, Workload
from aioengine.request import SamplingParams

STALL_SECONDS = 600.0
"""After so long without a step or a move while requests wait, a run is given up."""

Progress = Callable[[int, int | None, float], None]
"""Told of: requests ended, of how many (None: not known), and seconds into the run."""


class RunStalled(AioEngineError):
    """The policy, or what the requests ask for, has brought the run to a standstill."""


class Replayed(NamedTuple):
    """What came of a workload."""

    requests: int
    finished: int
    """Up to their last token."""
    refused: int
    """Never accepted."""
    failed: int
    """Accepted, and ended with an error: a deadline passed, say."""
    seconds: float
    """From the start to the end of the last request."""


async def replay(
    engine: AsyncEngine,
    workload: Workload,
    sink: Sink,
    *,
    paths: Mapping[str, str | Path] | None = None,
    seed: int = 0,
    sample_seconds: float = 1.0,
    progress: Progress | None = None,
    total: int | None = None,
) -> Replayed:
    """Send every request at its time, whatever became of those before it (an open loop), and wait for all
    of them. No more of the workload is held than the requests that have not ended.

    Args:
        engine: It must be running; the workload's adapters are registered first.
        paths: Where a live engine finds the adapters, by name; those that are not in it must be
            registered, or found by its resolver.
        seed: For the prompts, which are random tokens on a live engine.
        sample_seconds: Between two samples; ``progress`` is told as often.
        total: How many requests there are, for ``progress``.

    Raises:
        RunStalled: Nothing has moved for :data:`STALL_SECONDS` while requests wait.
        ConfigError: ``sample_seconds`` is not more than 0.
    """
    if not sample_seconds > 0:
        raise ConfigError(f"sample_seconds={sample_seconds}: must be more than 0")
    if isinstance(engine, SimulatedEngine):
        engine.add_adapters(workload.adapters)
    else:
        known = {info.name for info in engine.adapters()}
        for shape in workload.adapters:
            if paths is not None and shape.name in paths and shape.name not in known:
                engine.register_adapter(shape.name, paths[shape.name])
    return await _Replay(engine, workload, sink, seed, sample_seconds, progress, total).run()


class _Replay:
    def __init__(
        self,
        engine: AsyncEngine,
        workload: Workload,
        sink: Sink,
        seed: int,
        sample_seconds: float,
        progress: Progress | None,
        total: int | None,
    ) -> None:
        self._engine = engine
        self._requests: _SimulatedRequests | LiveRequests
        if isinstance(engine, SimulatedEngine):
            self._requests = _SimulatedRequests()
        else:
            self._requests = LiveRequests(engine.model_spec, seed)
        self._workload = workload
        self._sample_seconds = sample_seconds
        self._progress = progress
        self._total = total
        self._loop = asyncio.get_running_loop()
        self._start = self._loop.time()
        ranks = {shape.name: shape.rank for shape in workload.adapters}
        self._recorder = Recorder(engine, sink, start=self._start, ranks=ranks)
        self._finished = self._refused = self._failed = 0

    async def run(self) -> Replayed:
        remove = self._engine.add_listener(self._recorder)
        try:
            async with asyncio.TaskGroup() as around:
                watch = around.create_task(self._watch(), name="aioengine-lab-watch")
                async with asyncio.TaskGroup() as requests:
                    await self._send_all(requests)
                watch.cancel()
        except* AioEngineError as errors:
            raise _first(errors) from None
        finally:
            remove()
        now = self._loop.time()
        self._recorder.close(now)
        self._tell(now)
        count = self._finished + self._refused + self._failed
        return Replayed(count, self._finished, self._refused, self._failed, now - self._start)

    async def _send_all(self, group: asyncio.TaskGroup) -> None:
        loop, start = self._loop, self._start
        for index, arrival in enumerate(self._workload):
            wait = start + arrival.time - loop.time()
            if wait > 0:
                await asyncio.sleep(wait)
            group.create_task(self._send(f"r{index}", index, arrival))

    async def _send(self, request_id: str, index: int, arrival: Arrival) -> None:
        engine, recorder = self._engine, self._recorder
        recorder.expect(request_id, arrival)
        if isinstance(engine, SimulatedEngine):
            engine.set_length(request_id, arrival.output_tokens)
        try:
            await engine.complete(
                self._requests.prompt(index, arrival),
                self._requests.params(arrival),
                adapter=arrival.adapter,
                request_id=request_id,
                priority=arrival.priority,
                deadline=arrival.deadline,
                tenant=arrival.tenant,
                expected_tokens=arrival.expected_tokens,
            )
        except (EngineDead, EngineStopped):
            raise  # there is nothing more to be had of this engine
        except AioEngineError as error:
            if recorder.refused(request_id, self._loop.time(), error):
                self._refused += 1
            else:
                self._failed += 1
        else:
            self._finished += 1
        finally:
            if isinstance(engine, SimulatedEngine):
                engine.forget_length(request_id)

    async def _watch(self) -> None:
        """Sample at regular times, and see that something moves."""
        loop, recorder, tick = self._loop, self._recorder, 0
        while True:
            tick += 1
            await asyncio.sleep(self._start + tick * self._sample_seconds - loop.time())
            now = loop.time()
            recorder.sample(now)
            self._tell(now)
            if not recorder.under_way:
                recorder.last_progress = now
            elif now - recorder.last_progress > STALL_SECONDS:
                stats = self._engine.stats()
                raise RunStalled(
                    f"at {now - self._start:g} s: no step and no move of an adapter has ended for "
                    f"{STALL_SECONDS:g} s, while {stats.waiting} requests wait ({stats.waiting_for_adapter} "
                    f"of them for an adapter) and {stats.running} run; see what the policy waits for"
                )

    def _tell(self, now: float) -> None:
        if self._progress is not None:
            self._progress(self._recorder.ended, self._total, now - self._start)


class _SimulatedRequests:
    """Prompts without content, cut from one list; the engine knows the outputs' lengths."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._params: dict[int, SamplingParams] = {}

    def prompt(self, _index: int, arrival: Arrival) -> list[int]:
        if len(self._tokens) < arrival.prompt_tokens:
            self._tokens = [TOKEN] * arrival.prompt_tokens
        return self._tokens[: arrival.prompt_tokens]

    def params(self, arrival: Arrival) -> SamplingParams:
        allowed = arrival.output_tokens if arrival.max_tokens is None else arrival.max_tokens
        known = self._params.get(allowed)
        if known is None:
            known = self._params[allowed] = SamplingParams(max_tokens=allowed)
        return known


def _first(errors: BaseExceptionGroup[AioEngineError]) -> AioEngineError:
    """Of those that came at once, which are much the same."""
    error = errors.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
