"""Reads off the loop: tried again, given up, left behind."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from support.waiting import until

from aioengine.adapters import loader as loaders
from aioengine.adapters.loader import BaseLoader
from aioengine.adapters.read_threads import Progress
from aioengine.config import LoRAConfig
from aioengine.errors import AdapterInvalid, AdapterLoadError, AioEngineError
from aioengine.executors.thread import ThreadDevice
from aioengine.lab.simulation.clock import VirtualTimeLoop
from aioengine.step import LoadedAdapter, ReadOrder

Read = Callable[[], Any]


def flaky(*, transient: bool = True) -> AdapterLoadError:
    return AdapterLoadError("cannot read x: EIO", name="x", path="/x", transient=transient)


class Attempts(BaseLoader):
    """Fails with each of ``errors`` in turn, then succeeds. It never says that a read has ended."""

    def __init__(self, *errors: Exception, retries: int, seed: int = 0) -> None:
        super().__init__(LoRAConfig(load_retries=retries), seed)
        self.errors = list(errors)
        self.times: list[float] = []

    async def _read(self, order: ReadOrder, progress: Progress) -> LoadedAdapter:
        self.times.append(asyncio.get_running_loop().time())
        if self.errors:
            raise self.errors.pop(0)
        return LoadedAdapter(4, 10, 10, "read")

    def run(self) -> tuple[Any, list[float]]:
        """Return the digest or error, and the waits between the attempts."""

        async def main() -> Any:
            try:
                return (await self.load(ReadOrder(0, "x", "/x", lambda: None))).digest
            except AioEngineError as error:
                return error

        with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
            return runner.run(main()), [after - before for before, after in pairwise(self.times)]


def test_a_passing_error_is_tried_again_after_growing_waits() -> None:
    result, waits = Attempts(flaky(), flaky(), flaky(), retries=3).run()
    assert result == "read"
    for wait, longest in zip(waits, (0.1, 0.2, 0.4), strict=True):
        assert longest / 2 <= wait <= longest + 1e-6
    again, other = (Attempts(flaky(), flaky(), flaky(), retries=3, seed=seed).run()[1] for seed in (0, 1))
    assert again == waits != other, "the same for a seed"


@pytest.mark.parametrize("error", [flaky(transient=False), AdapterInvalid("bad", name="x")])
def test_an_error_for_good_is_not_tried_again(error: Exception) -> None:
    attempts = Attempts(error, retries=3)
    assert attempts.run() == (error, [])
    assert len(attempts.times) == 1


def test_after_the_last_attempt_the_error_says_how_many_there_were() -> None:
    attempts = Attempts(flaky(), flaky(), flaky(), retries=2)
    error, _ = attempts.run()
    assert isinstance(error, AdapterLoadError)
    assert len(attempts.times) == 3
    assert "EIO (3 attempts" in str(error)
    once, _ = Attempts(flaky(), retries=0).run()
    assert "attempts" not in str(once)


def test_a_read_that_could_not_begin_is_in_nobodys_way() -> None:
    attempts = Attempts(RuntimeError("can't start new thread"), retries=0)
    with pytest.raises(RuntimeError, match="new thread"):
        attempts.run()
    assert attempts.run()[0] == "read"


class FakeStore:
    """``reads[name]`` is what a read of it does, in its thread."""

    def __init__(self, **reads: Read) -> None:
        self.reads = reads
        self.images: dict[int, Any] = {}

    def begin(self, name: str, path: str, progress: Any, files: Any) -> Any:
        self.reads.get(name, lambda: None)()
        return SimpleNamespace(loaded=LoadedAdapter(4, 10, 10, name))

    def finish(self, draft: Any) -> Any:
        return draft

    def clear(self) -> None:
        self.images.clear()


def loader_of(store: Any, retries: int = 0, timeout: float | None = None) -> ThreadDevice:
    runner: Any = SimpleNamespace(kernels="", variance=None)
    return ThreadDevice(runner, store, LoRAConfig(load_retries=retries, load_timeout=timeout))


async def load(loader: ThreadDevice, uid: int, name: str) -> Any:
    return await loader.load(ReadOrder(uid, name, f"/adapters/{name}", lambda: None))


class Hanging:
    """A read that does not return until it is released."""

    def __init__(self) -> None:
        self.entered = threading.Semaphore(0)
        self.release = threading.Event()

    def __call__(self) -> None:
        self.entered.release()
        assert self.release.wait(30)


@pytest.fixture
def hanging() -> Any:
    read = Hanging()
    yield read
    read.release.set()


async def test_reads_that_were_only_cancelled_are_waited_for(
    hanging: Hanging, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaders, "GRACE_SECONDS", 60.0)
    loader = loader_of(FakeStore(dead=hanging))
    tasks = [asyncio.create_task(load(loader, i, "dead")) for i in range(8)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    assert (await load(loader, 98, "good")).digest == "good"
    waiting = asyncio.create_task(load(loader, 99, "dead"))
    await asyncio.wait([waiting], timeout=0.01)
    assert not waiting.done(), "it waits for those of the same folder"
    hanging.release.set()
    assert (await waiting).digest == "dead"
    await loader.close()


async def test_no_thread_is_held_while_a_retry_is_waited_for() -> None:
    loop, failed = asyncio.get_running_loop(), asyncio.Event()

    def fail() -> None:
        loop.call_soon_threadsafe(failed.set)
        raise flaky()

    loader = loader_of(FakeStore(x=fail), retries=20)
    threads = set(threading.enumerate())
    task = asyncio.create_task(loader.load(ReadOrder(0, "x", "/x", lambda: None)))
    await failed.wait()
    await until(lambda: set(threading.enumerate()) <= threads)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried "
            "to allocate 123 bytes. Error code 12 (Cannot allocate memory)"
        ),
    ],
)
async def test_a_lack_of_memory_is_the_adapters_error(error: Exception) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(AdapterLoadError, match=r"'x' \(/adapters/x\).*not enough memory.*max_cpu_lora"):
        await load(loader_of(FakeStore(x=fail)), 0, "x")


@pytest.mark.parametrize("error", [StopIteration(), asyncio.CancelledError(), SystemExit(1)])
async def test_a_read_that_raises_what_would_disturb_the_loop(error: BaseException) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(RuntimeError, match=type(error).__name__):
        await load(loader_of(FakeStore(x=fail)), 0, "x")


def test_a_read_that_hangs_does_not_keep_the_process_from_ending() -> None:
    code = """
        import asyncio, threading
        from aioengine.adapters.read_threads import start_read

        async def main():
            entered = threading.Event()
            def read():
                entered.set()
                threading.Event().wait()
            task = start_read("load", read)
            await asyncio.sleep(0)
            await asyncio.to_thread(entered.wait)
            task.cancel()

        asyncio.run(main())
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=120)
