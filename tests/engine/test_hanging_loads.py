"""Reads that hang hold up those who need them, and nobody else; what fails is not read at every request."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from support import steady_device
from support.steady_device import Steady

from aioengine.adapters.loader import MAX_HANGING_IN_FOLDER, STALL_SECONDS, BaseLoader
from aioengine.adapters.read_threads import Progress
from aioengine.config import LoRAConfig
from aioengine.core.adapters.name import LONGEST_SECONDS, MAX_REMEMBERED
from aioengine.errors import AdapterInvalid, AdapterLoadError
from aioengine.events import Event, RequestEnded
from aioengine.runtime.loop import EngineLoop
from aioengine.schedulers.policies.fcfs import FCFS
from aioengine.step import LoadedAdapter, ReadOrder
from aioengine.testing import LIMITS, Sim


class Loader(BaseLoader):
    """Reads are tasks that go on when nobody waits for them any more. ``seconds`` says for how long one waits
    in a single call, by the name's first letters; others take 0.05 seconds."""

    def __init__(self, seconds: dict[str, float], *, pieces: int = 1, timeout: float | None = None) -> None:
        super().__init__(LoRAConfig(load_retries=0, load_timeout=timeout))
        self.reads: list[str] = []
        self._seconds = seconds
        self._pieces = pieces

    async def _read(self, order: ReadOrder, progress: Progress) -> LoadedAdapter:
        self.reads.append(order.name)
        task = asyncio.get_running_loop().create_task(self._thread(order.name, progress))
        await asyncio.wait([task])
        task.result()
        return LoadedAdapter(8, 100, 100, "x")

    async def _thread(self, name: str, progress: Progress) -> None:
        seconds = next((s for start, s in self._seconds.items() if name.startswith(start)), 0.05)
        for _ in range(self._pieces):
            with progress:
                await asyncio.sleep(seconds / self._pieces)
        progress.running = False


class Reading(Steady):
    """Loads with ``loader``."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    async def load(self, order: ReadOrder) -> LoadedAdapter:
        return await self._loader.load(order)


class World:
    """When each request ended, and why."""

    def __init__(self, stepper: EngineLoop) -> None:
        self.stepper = stepper
        self.ends: dict[str, tuple[float, str]] = {}
        stepper.listeners.add(self._listen)

    def _listen(self, event: Event) -> None:
        if isinstance(event, RequestEnded):
            self.ends[event.request_id] = event.time, event.reason

    def add(self, name: str) -> None:
        """A request on the adapter of this name, which is its id as well."""
        mount = "dead" if name.startswith("hang") else "fine"
        steady_device.add(self.stepper, name, name, f"/{mount}/{name}")


def run(loader: Loader, main: Callable[[World], Awaitable[None]]) -> None:
    steady_device.run(FCFS(), lambda stepper: main(World(stepper)), Reading(loader))


@pytest.mark.parametrize("hanging", [1, 2, 8, 24])
def test_a_healthy_adapter_is_loaded_though_others_hang(hanging: int) -> None:
    loader = Loader({"hang": 1e6}, timeout=60.0)

    async def main(world: World) -> None:
        for i in range(hanging):
            world.add(f"hang{i}")
        await asyncio.sleep(0.01)
        world.add("good")
        await asyncio.sleep(59)
        at, reason = world.ends["good"]
        assert reason == "length"
        assert at < STALL_SECONDS + 0.06 * hanging + 0.5
        await asyncio.sleep(70)
        assert {world.ends[f"hang{i}"][1] for i in range(hanging)} == {"error"}

    run(loader, main)


def test_a_slow_read_keeps_its_place_while_it_makes_progress() -> None:
    loader = Loader({"slow": 20.0}, pieces=40, timeout=60.0)

    async def main(world: World) -> None:
        for i in range(5):
            world.add(f"slow{i}")
        await asyncio.sleep(10)
        assert len(loader.reads) == LIMITS.max_loads
        await asyncio.sleep(80)
        assert {reason for _, reason in world.ends.values()} == {"length"}

    run(loader, main)


def test_one_that_hung_and_finds_no_room_is_read_again_later() -> None:
    """The CPU cache is full of adapters that are in use when it returns."""
    loader = Loader({"late": 5.0}, timeout=60.0)

    async def main(world: World) -> None:
        world.add("late")
        for i in range(12):
            world.add(f"good{i}")
        await asyncio.sleep(60)
        assert {reason for _, reason in world.ends.values()} == {"length"}

    run(loader, main)


def test_a_mount_that_hangs_takes_so_many_threads_and_no_more() -> None:
    loader = Loader({"hang": 1e6}, timeout=1000.0)

    async def main(world: World) -> None:
        for i in range(100):
            world.add(f"hang{i}")
        await asyncio.sleep(20)
        assert len(loader.reads) == MAX_HANGING_IN_FOLDER
        refused = [end for end in world.ends.values() if end[1] == "error"]
        assert len(refused) == 100 - MAX_HANGING_IN_FOLDER
        world.add("good")
        await asyncio.sleep(0.5)
        assert world.ends["good"][1] == "length"

    run(loader, main)


def test_the_pause_after_failures_grows_and_ends() -> None:
    names = Sim().core.residency.names
    now, pauses = 0.0, []

    def error() -> AdapterInvalid:
        return AdapterInvalid("bad", name="x", path="/x")

    def refused() -> bool:
        try:
            names.of("x").check_worth_a_try(now)
        except AdapterInvalid:
            return True
        return False

    for _ in range(12):
        names.of("x").fail(error(), now)
        begin = now
        while refused():
            now += 0.25
        pauses.append(now - begin)
    names.of("x").fail(error(), now)
    with pytest.raises(AdapterInvalid, match=r"'x' \(/x\): bad \(failed 13 times.*30.0 s"):
        names.of("x").check_worth_a_try(now)
    assert pauses[:4] == [0.0, 0.5, 1.0, 2.0] and pauses[-1] == LONGEST_SECONDS
    names.of("x").succeed()
    names.of("x").check_worth_a_try(now)
    for i in range(MAX_REMEMBERED + 100):
        names.of(f"n{i}").fail(AdapterLoadError("EIO", name=f"n{i}"), now)
    assert sum(names.of(f"n{i}").failures for i in range(MAX_REMEMBERED + 100)) <= MAX_REMEMBERED


def test_what_several_say_of_one_failure_counts_once() -> None:
    names, error = Sim().core.residency.names, AdapterInvalid("bad", name="x", path="/x")
    for now in (0.0, 0.0, 0.001, 0.4):
        names.of("x").fail(error, now)
    assert names.of("x").failures == 1
    for now in (0.5, 1.5, 9.0):  # an application's resolver that raises one error again and again
        names.of("x").fail(error, now)
    assert names.of("x").failures == 4
