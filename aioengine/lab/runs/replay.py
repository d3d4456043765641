"""Runs a workload on an engine, live or simulated, and records the results."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

from aioengine.engine import AsyncEngine
from aioengine.errors import AioEngineError, EngineDead, EngineStopped
from aioengine.lab.calibration.live import LiveRequests
from aioengine.lab.runs.open_loop import OpenLoop, Progress, Replayed
from aioengine.lab.runs.recorder import Recorder
from aioengine.lab.runs.rows import Sink
from aioengine.lab.simulation.engine import SimulatedEngine
from aioengine.lab.workload.prompts import SimulatedRequests
from aioengine.lab.workload.requests import Arrival, Workload


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
    """Send every request at its time, whether or not earlier ones have ended (an open loop), and wait for all
    of them. Only requests that have not ended are in memory.

    Args:
        engine: It must be running; the workload's adapters are registered first.
        paths: Where a live engine finds the adapters, by name; those that are not in it must be
            registered, or found by its resolver.
        seed: For the prompts, which are random tokens on a live engine.
        sample_seconds: Between two samples; ``progress`` is told as often.
        total: How many requests there are, for ``progress``.

    Raises:
        RunStalled: Nothing has moved for ``STALL_SECONDS`` while requests wait, or no request got a token in
            ``MOST_WITHOUT_TOKEN`` steps and moves.
        ConfigError: ``sample_seconds`` is not more than 0.
    """
    if isinstance(engine, SimulatedEngine):
        engine.add_adapters(workload.adapters)
    else:
        known = {info.name for info in engine.adapters()}
        for shape in workload.adapters:
            if paths is not None and shape.name in paths and shape.name not in known:
                engine.register_adapter(shape.name, paths[shape.name])
    return await _Replay(engine, workload, sink, seed, sample_seconds, progress, total).run()


class _Replay(OpenLoop):
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
        start = asyncio.get_running_loop().time()
        ranks = {shape.name: shape.rank for shape in workload.adapters}
        self._recorder = Recorder(engine, sink, start=start, ranks=ranks, objective=workload.objective)
        super().__init__(
            self._recorder,
            workload,
            start=start,
            sample_seconds=sample_seconds,
            progress=progress,
            total=total,
        )
        self._engine = engine
        self._requests: SimulatedRequests | LiveRequests
        if isinstance(engine, SimulatedEngine):
            self._requests = SimulatedRequests(engine.model_spec.vocab_size)
        else:
            self._requests = LiveRequests(engine.model_spec, seed)

    async def run(self) -> Replayed:
        remove = self._engine.add_listener(self._recorder, *self._recorder.heard)
        try:
            await self.send_all()
        finally:
            remove()
        now = self._loop.time()
        self._recorder.close(now)
        self.tell(now)
        return self.replayed()

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

    def _state(self) -> str:
        stats = self._engine.stats()
        slots = ", ".join(f"{slot.adapter or 'empty'} ({slot.state})" for slot in stats.slots[:8])
        return (
            f"{stats.waiting} requests wait ({stats.waiting_for_adapter} of them for an adapter) and "
            f"{stats.running} run; slots: {slots}{', ...' if len(stats.slots) > 8 else ''}"
        )
