"""Runs a workload on a simulated fleet."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, NamedTuple

from aioengine.errors import AioEngineError
from aioengine.lab.fleet.conditions import Conditions
from aioengine.lab.fleet.door import SimulatedFleet
from aioengine.lab.fleet.recorder import FleetRecorder
from aioengine.lab.fleet.scaling import Scaled
from aioengine.lab.runs.open_loop import OpenLoop, Progress, Replayed
from aioengine.lab.runs.policy_record import PolicyWatch
from aioengine.lab.runs.rows import Sink
from aioengine.lab.simulation.engine import SimulatedEngine
from aioengine.lab.workload.prompts import SimulatedRequests
from aioengine.lab.workload.requests import Arrival, Workload
from aioengine.schedulers.routing import PlacementPolicy, RouterPolicy, ScalingPolicy


class FleetReplayed(NamedTuple):
    """Result of a workload on a fleet."""

    replayed: Replayed
    requests_by_replica: list[int]
    """Requests sent to each replica; a request that is sent again counts again."""
    migrations: int
    """Requests sent to another replica after theirs was lost."""
    rejected: int
    """Requests that were rejected by the router, or because there was no replica."""
    failures: dict[str, int]
    """Failures of the router and of the placement policy, by kind."""
    moves: dict[str, int]
    """Steps of plans, by kind."""
    scaled: Scaled | None
    """None: the number of replicas was fixed."""


async def replay_on_fleet(
    workload: Workload,
    sink: Sink,
    *,
    replicas: int,
    make_engine: Callable[[], SimulatedEngine],
    router: RouterPolicy,
    placement: PlacementPolicy,
    autoscale: ScalingPolicy | None = None,
    conditions: Conditions | None = None,
    sample_seconds: float = 1.0,
    progress: Progress | None = None,
    total: int | None = None,
    look: Callable[[SimulatedFleet], Any] = lambda fleet: None,
    listener: PolicyWatch | None = None,
) -> FleetReplayed:
    """Start a fleet, send every request at its time, wait for all of them, and stop the fleet.

    Args:
        make_engine: Makes the engine of one replica.
        look: Called with the fleet when it has started, and again before it is stopped.
        listener: Called with the events of all replicas' engines.

    Raises what :func:`aioengine.lab.runs.replay.replay` raises.
    """
    conditions = conditions or Conditions()
    start = asyncio.get_running_loop().time()
    first = make_engine()
    lora = first.config.lora
    recorder = FleetRecorder(
        sink,
        start=start,
        ranks={shape.name: shape.rank for shape in workload.adapters},
        slots=0 if lora is None else lora.max_loras,
        delay=conditions.delay,
        objective=workload.objective,
        listener=listener,
    )
    fleet = SimulatedFleet(
        replicas, make_engine, router, placement, conditions, autoscale=autoscale, watch=recorder.watch
    )
    async with fleet:
        fleet.add_adapters(workload.adapters)
        look(fleet)
        loop = _Loop(
            fleet,
            recorder,
            workload,
            vocab_size=first.costs.spec.vocab_size,
            start=start,
            sample_seconds=sample_seconds,
            progress=progress,
            total=total,
        )
        await loop.send_all()
        replayed = loop.replayed()
        scaled = None if fleet.scaler is None else fleet.scaler.result()
        fleet.check_invariants()
        look(fleet)
    now = asyncio.get_running_loop().time()
    recorder.close(now)
    loop.tell(now)
    return FleetReplayed(
        replayed,
        fleet.by_replica,
        fleet.migrations,
        fleet.rejected,
        dict(fleet.guard.failures + fleet.plan_guard.failures),
        dict(fleet.moves),
        scaled,
    )


class _Loop(OpenLoop):
    def __init__(
        self,
        fleet: SimulatedFleet,
        recorder: FleetRecorder,
        workload: Workload,
        *,
        vocab_size: int,
        start: float,
        sample_seconds: float,
        progress: Progress | None,
        total: int | None,
    ) -> None:
        super().__init__(
            recorder, workload, start=start, sample_seconds=sample_seconds, progress=progress, total=total
        )
        self._fleet = fleet
        self._recorder = recorder
        self._requests = SimulatedRequests(vocab_size)

    async def _send(self, request_id: str, index: int, arrival: Arrival) -> None:
        fleet, recorder = self._fleet, self._recorder
        recorder.expect(request_id, arrival)
        fleet.set_length(request_id, arrival.output_tokens)
        failed: AioEngineError | None = None
        tokens: int | None = None
        try:
            output = await fleet.complete(
                self._requests.prompt(index, arrival),
                self._requests.params(arrival),
                adapter=arrival.adapter,
                request_id=request_id,
                priority=arrival.priority,
                deadline=arrival.deadline,
                tenant=arrival.tenant,
                expected_tokens=arrival.expected_tokens,
            )
            tokens = len(output.token_ids)
        except AioEngineError as error:
            failed = error
        finally:
            fleet.forget_length(request_id)
        accepted = recorder.settled(request_id, self._loop.time(), failed, tokens)
        if failed is None:
            self._finished += 1
        elif accepted:
            self._failed += 1
        else:
            self._refused += 1

    def _state(self) -> str:
        return f"{self._fleet.state.in_flight} requests are in flight"
