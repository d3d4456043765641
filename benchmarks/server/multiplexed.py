"""Fifty users of one adapter on two replicas: this project's fleet against Ray Serve's multiplexing.

    python -m benchmarks.server.multiplexed [--model smollm2-135m] [--users 50] [--each 4] [--rounds 2]

The setup of https://github.com/ray-project/ray/issues/48741. Both have the same engine in two replicas of one
CPU each. With Serve the adapter is a model of ``@serve.multiplexed``, as in Ray Serve LLM: requests name it
in ``multiplexed_model_id``, and Serve's own router chooses the replica. Each user sends a request when the
last one is answered. "most": the requests of the busier replica, in fair shares (1 is even, 2 is all on one).
Prints; asserts nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

from aioengine.config import EngineConfig, LoRAConfig
from aioengine.engine import AsyncEngine
from aioengine.fleet.cluster import connect, open_door
from aioengine.fleet.config import FleetConfig
from aioengine.fleet.deployment import make_client, plan_replica, read_model, replica_application
from aioengine.lab.calibration.random_adapters import write_random_adapter
from aioengine.model.files.resolve import read_spec, resolve_model
from aioengine.request import SamplingParams
from benchmarks.shared.report import arguments

PROMPT_TOKENS, OUTPUT_TOKENS, RANK = 64, 32, 16
HOT = "hot"
MODELS_EACH = 16
"""Ray Serve LLM's default (``max_num_adapters_per_replica``)."""

Ask = Callable[[int, int], Awaitable[str]]
"""(user, turn) -> the replica that answered."""


class Shares(NamedTuple):
    by_replica: Counter[str]
    seconds: float
    answer: float
    """Median of the time that a user waited for a whole answer, in seconds."""


def prompt_of(user: int, turn: int) -> list[int]:
    return [1000 + (user * 131 + turn * 17 + i * 7) % 20000 for i in range(PROMPT_TOKENS)]


def params() -> SamplingParams:
    return SamplingParams(max_tokens=OUTPUT_TOKENS, temperature=0, ignore_eos=True)


async def closed_loop(ask: Ask, users: int, each: int) -> Shares:
    counts: Counter[str] = Counter()
    waits: list[float] = []

    async def user(index: int) -> None:
        for turn in range(each):
            began = time.monotonic()
            counts[await ask(index, turn)] += 1
            waits.append(time.monotonic() - began)

    began = time.monotonic()
    await asyncio.gather(*[user(index) for index in range(users)])
    return Shares(counts, time.monotonic() - began, sorted(waits)[len(waits) // 2])


@asynccontextmanager
async def our_fleet(engine: EngineConfig, adapter: str, router: str) -> AsyncIterator[Ask]:
    config = FleetConfig(engine=engine, replicas=2, router=router, adapters={HOT: adapter}, name="ours")
    config, plan = await asyncio.to_thread(plan_replica, config, share=2)
    door = await asyncio.to_thread(open_door, config, lambda: replica_application(config))
    client = make_client(config, door.handle, read_model(config, plan), door=door.name)
    await client.start()

    async def ask(user: int, turn: int) -> str:
        where = ""
        name = f"{user}-{turn}"
        async for _ in client.generate(prompt_of(user, turn), params(), adapter=HOT, request_id=name):
            where = client.replica_of(name) or where
        return where

    try:
        yield ask
    finally:
        await client.stop()
        await asyncio.to_thread(door.close)


@asynccontextmanager
async def serve_multiplexed(engine: EngineConfig, adapter: str, router: str) -> AsyncIterator[Ask]:
    from ray import serve

    class Multiplexed:
        async def __init__(self) -> None:  # type: ignore[misc] # Serve awaits it
            import torch

            torch.set_num_threads(1)
            self.engine = AsyncEngine(engine)
            await self.engine.start()

        @serve.multiplexed(max_num_models_per_replica=MODELS_EACH)  # type: ignore[untyped-decorator]
        async def adapter(self, name: str) -> str:
            await self.engine.load_adapter(name, adapter)
            return name

        async def __call__(self, prompt: list[int]) -> str:
            name = await self.adapter(serve.get_multiplexed_model_id())
            await self.engine.complete(prompt, params(), adapter=name)
            return str(serve.get_replica_context().replica_id.unique_id)

    application = serve.deployment(
        Multiplexed,
        num_replicas=2,
        max_ongoing_requests=10**9,  # Ray Serve LLM's
        ray_actor_options={"num_cpus": 1, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1"}}},
    ).bind()
    handle = await asyncio.to_thread(serve.run, application, name="theirs", route_prefix=None)
    hot = handle.options(multiplexed_model_id=HOT)

    async def ask(user: int, turn: int) -> str:
        where: str = await hot.remote(prompt_of(user, turn))
        return where

    try:
        yield ask
    finally:
        await asyncio.to_thread(serve.delete, "theirs")


WAYS: dict[str, tuple[Any, str]] = {
    "Serve's multiplexing": (serve_multiplexed, ""),
    "`holder`": (our_fleet, "holder"),
    "`affinity`": (our_fleet, "affinity"),
}


async def compare(given: argparse.Namespace, folder: Path) -> None:
    model = resolve_model(given.model)
    adapter = str(write_random_adapter(folder / HOT, read_spec(model), RANK, seed=1))
    lora = LoRAConfig(max_loras=2, max_lora_rank=RANK)
    engine = EngineConfig(
        model=str(model), lora=lora, max_model_len=512, kv_cache_memory="256MiB", enable_prefix_caching=False
    )
    print("| router | requests by replica | most | tokens/s | answer p50 |\n|---|---|---|---|---|")
    for _ in range(given.rounds):
        for name, (way, router) in WAYS.items():
            async with way(engine, adapter, router) as ask:
                await asyncio.gather(*[ask(user, 99) for user in range(2)])  # loads what is loaded once
                found = await closed_loop(ask, given.users, given.each)
            counts = sorted(found.by_replica.values(), reverse=True)
            most = counts[0] / (sum(counts) / 2)
            rate = sum(counts) * OUTPUT_TOKENS / found.seconds
            row = [name, " : ".join(map(str, [*counts, 0][:2])), f"{most:.2f}", f"{rate:.0f}"]
            print("|", " | ".join([*row, f"{found.answer:.2f} s"]), "|", flush=True)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--users", type=int, default=50)
    parser.add_argument("--each", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    cluster = connect(cpus=2)
    try:
        with tempfile.TemporaryDirectory() as folder:
            asyncio.run(compare(given, Path(folder)))
    finally:
        cluster.close()


if __name__ == "__main__":
    main()
