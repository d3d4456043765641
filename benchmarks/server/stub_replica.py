"""A replica without a model, which answers at once, so that only the door and the way to it are measured."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Callable
from types import SimpleNamespace
from typing import Any

from aioengine.fleet import deployment
from aioengine.fleet.replica import EngineReplica
from aioengine.info import EngineLoad, SlotTable

STEP_VARIABLE = "AIOENGINE_STUB_STEP_SECONDS"
"""Seconds from one token of a request to the next."""
TOKEN, TEXT = 300, " word"


class StubEngine:
    """Has what a replica asks of its engine. A request's first token comes at once. All running requests get
    their next tokens at the same moment, as those of one batch do."""

    state = "running"
    info = SimpleNamespace(batch_invariant=True)
    metrics = SimpleNamespace(expose=lambda accept: (b"", ""))

    def __init__(self) -> None:
        self._step_seconds = float(os.environ[STEP_VARIABLE])
        self._step = asyncio.Event()
        self._running = 0
        self._steps = asyncio.get_running_loop().create_task(self._make_steps())

    async def _make_steps(self) -> None:
        while True:
            await asyncio.sleep(self._step_seconds)
            step, self._step = self._step, asyncio.Event()
            step.set()

    async def generate(self, prompt: list[int], params: Any, **options: Any) -> AsyncGenerator[Any, None]:
        output = SimpleNamespace(
            token_ids_delta=[TOKEN],
            text_delta=TEXT,
            finish_reason=None,
            stop_reason=None,
            cached_tokens=0,
            pinned_tokens=0,
            logprobs_delta=[],
            prompt_logprobs=None,
            pooled=None,
        )
        self._running += 1
        try:
            for _ in range(params.max_tokens - 1 - len(options["output"])):
                yield output
                await self._step.wait()
            yield SimpleNamespace(**{**vars(output), "finish_reason": "length"})
        finally:
            self._running -= 1

    def load(self) -> EngineLoad:
        return EngineLoad(
            running=self._running,
            waiting=0,
            waiting_tokens=0,
            running_tokens=0,
            kv_tokens=10**6,
            kv_tokens_free=10**6,
            waiting_for={},
            step_age=0.0,
        )

    def slots(self) -> SlotTable:
        return SlotTable(version=0, slots=())

    def resident(self) -> list[Any]:
        return []

    adapters = replaced = resident

    def find_adapter(self, name: str) -> None:
        return None

    def step_age(self) -> float:
        return 0.0

    def limit_waiting(self, limits: Any) -> None:
        pass

    def add_listener(self, listener: Callable[..., None]) -> Callable[[], None]:
        return lambda: None

    async def stop(self) -> None:
        self._steps.cancel()


class StubReplica(EngineReplica):
    async def start_engine(self) -> Any:
        return StubEngine()

    async def adapter(self, action: str, arguments: dict[str, Any], to: str | None = None) -> Any:
        return [] if action == "others" else None


def serve() -> None:
    """Run ``aioengine serve`` with stubs in place of its replicas."""
    from aioengine.cli.main import main

    deployment.EngineReplica = StubReplica  # type: ignore[misc]
    raise SystemExit(main())
