"""A worker: one rank of the model in a separate process.

Started as ``python -m aioengine.executors.process.worker RANK FD``. It exits at once when the other end of
its socket FD closes, and leaves nothing to clean up. The main thread receives requests. Steps run in one
thread, copies in another, and each read in its own, as with the thread device.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec

from aioengine.adapters.loader import enough_memory
from aioengine.adapters.read_threads import Progress
from aioengine.errors import DeviceError
from aioengine.executors.parts import build_parts, plan_parts
from aioengine.executors.process import wire
from aioengine.memory_plan import MemoryPlan
from aioengine.model.cuda.failures import device_error
from aioengine.model.parallel.group import DistributedGroup, Group, Shard, SoloGroup
from aioengine.step import StepResult

if TYPE_CHECKING:
    from aioengine.adapters.store import AdapterStore, Draft
    from aioengine.model.runner import ModelRunner

RECEIVE_BYTES = 1 << 20
REPORT_SECONDS = 0.05
"""Minimum time between two reports."""


class Worker:
    """The worker process of a rank. ``connection`` is the engine's socket. Its parts of the model exist after
    ``_build``."""

    _runner: ModelRunner
    _store: AdapterStore

    def __init__(self, rank: int, connection: socket.socket) -> None:
        self._rank = rank
        self._connection = connection
        self._sending = threading.Lock()
        self._step_thread = ThreadPoolExecutor(1, thread_name_prefix="aioengine-step")
        self._copy_thread = ThreadPoolExecutor(1, thread_name_prefix="aioengine-copy")
        self._steps = wire.StepDecoder()
        self._reads: dict[int, list[Draft]] = {}
        """Drafts of the adapters that are read, by uid, until these are in the cache or dropped."""

    def run(self) -> NoReturn:
        """Serve requests until the engine is gone."""
        frames = wire.Frames()
        with contextlib.suppress(OSError):
            while data := self._connection.recv(RECEIVE_BYTES):
                for message in frames.feed(data):
                    request = wire.requests.decode(message)
                    self._dispatch(request.number, request.message)
        _exit()

    def _dispatch(self, number: int, message: wire.Message) -> None:
        match message:
            case wire.Step():
                self._masks = Future[Mapping[int, bytes]]()
                self._between_steps(number, partial(self._step, message, self._masks))
            case wire.Masks():
                self._masks.set_result(message.found)
            case wire.Read():
                self._read(number, message)
            case wire.Finish():
                self._finish(number, message)
            case wire.Drop():
                self._drop(message.uid)
            case wire.Place():
                # Before the copy's turn: it may be dropped until then.
                image = self._store.images[message.uid]
                copy = partial(self._runner.write, image, message.slot, message.offset)
                self._copy_thread.submit(self._answer, number, copy)
            case wire.Start():
                self._between_steps(number, partial(self._start, message))
            case wire.Build():
                self._between_steps(number, partial(self._build, message))

    def _between_steps(self, number: int, work: Callable[[], object]) -> None:
        """Do ``work`` in the thread of the steps, and answer. If it fails, this worker cannot go on."""
        self._step_thread.submit(self._answer, number, work, vital=True)

    def _answer(self, number: int, work: Callable[[], object], *, vital: bool = False) -> None:
        """Do ``work`` and answer. This worker cannot go on if it fails and is ``vital``, or if the device has
        failed."""
        try:
            report: wire.Report = wire.answer(number, work())
        except BaseException as error:
            found = device_error(error) if vital else error if isinstance(error, DeviceError) else None
            if found is not None:  # an error of the package crosses without its traceback
                with contextlib.suppress(OSError):  # nobody reads it any more
                    traceback.print_exception(error)
            broken = vital or found is not None
            report = wire.Failed(None if broken else number, wire.pack_error(found or error))
        self._send(report)

    def _send(self, report: wire.Report) -> None:
        data = wire.frame(report)
        try:
            with self._sending:
                self._connection.sendall(data)
        except OSError:  # the engine is gone
            _exit()

    def _start(self, start: wire.Start) -> MemoryPlan:
        import torch  # takes a second, in which the main thread already watches the engine

        from aioengine.model.parallel.group import rank_threads

        config, lora = start.config, start.config.lora
        size = config.tensor_parallel_size
        torch.set_num_threads(rank_threads(size))
        self._config = config
        self._shard = Shard(self._rank, size, lora is not None and lora.fully_sharded_loras)
        self._plan = plan_parts(config, self._shard)
        self._group = _join(self._shard, self._plan.memory.device, start.rendezvous)
        return self._plan.memory

    def _build(self, build: wire.Build) -> tuple[str, str | None]:
        memory = msgspec.structs.replace(self._plan.memory, num_blocks=build.num_blocks)
        self._runner, self._store = build_parts(self._config, self._plan._replace(memory=memory), self._group)
        gc.collect()
        gc.freeze()  # a full collection would visit all of it, within a step
        return self._runner.kernels, self._runner.variance

    def _step(self, step: wire.Step, masks: Future[Mapping[int, bytes]]) -> StepResult:
        result = self._runner.execute(self._steps.decode(step, masks))
        return result if self._shard.rank == 0 else StepResult((), (), result.seconds)

    # Reads, each in a thread of its own

    def _read(self, number: int, order: wire.Read) -> None:
        """Read this rank's share. Of an adapter that is dropped meanwhile, nothing is left when the thread
        has ended."""
        drafts: list[Draft] = []
        self._reads[order.uid] = drafts
        progress = _Reported(lambda: self._send(wire.Reading(number)))

        @enough_memory()
        def read() -> wire.ReadDone:
            draft = self._store.begin(order.name, order.path, progress, order.files)
            squares = draft.squares
            if squares:
                drafts.append(draft)
            else:
                self._keep(order.uid, draft)
            return wire.ReadDone(draft.loaded, draft.packed.version, squares)

        self._start_thread(number, read)

    def _finish(self, number: int, order: wire.Finish) -> None:
        [draft] = self._reads[order.uid]

        @enough_memory()
        def finish() -> None:
            for squares in order.squares:
                draft.add(squares)
            self._keep(order.uid, draft)

        self._start_thread(number, finish)

    def _start_thread(self, number: int, work: Callable[[], object]) -> None:
        name = f"aioengine-load-{number}"
        threading.Thread(target=self._answer, args=(number, work), name=name, daemon=True).start()

    def _keep(self, uid: int, draft: Draft) -> None:
        self._store.images[uid] = self._store.finish(draft)
        if self._reads.pop(uid, None) is None:  # dropped meanwhile, perhaps before it was in the cache
            self._store.images.pop(uid, None)

    def _drop(self, uid: int) -> None:
        self._reads.pop(uid, None)
        self._store.images.pop(uid, None)


class _Reported(Progress):
    """Progress that reports to the engine from time to time."""

    def __init__(self, report: Callable[[], None]) -> None:
        self._report = report
        self._last = time.monotonic()

    def moved(self) -> None:
        super().moved()
        if time.monotonic() - self._last >= REPORT_SECONDS:
            self._last = time.monotonic()
            self._report()


def _join(shard: Shard, device: str, rendezvous: str) -> Group:
    """Wait until all ranks have joined and ``rendezvous``, a file or "tcp://host:port" on rank 0's node, is
    no longer needed."""
    if shard.size == 1:
        return SoloGroup()
    import torch
    from torch import distributed

    store: Any
    if rendezvous.startswith("tcp://"):
        host, _, port = rendezvous.removeprefix("tcp://").rpartition(":")
        first = shard.rank == 0
        store = distributed.TCPStore(host, int(port), shard.size, is_master=first)  # type: ignore[attr-defined] # its stubs hide it
    else:
        store = distributed.FileStore(rendezvous, shard.size)  # type: ignore[attr-defined] # likewise
    distributed.init_process_group(
        "nccl" if device == "cuda" else "gloo", store=store, rank=shard.rank, world_size=shard.size
    )
    world = distributed.group.WORLD
    assert world is not None
    group = DistributedGroup(world, shard)
    group.all_reduce(torch.ones(1, device=device))  # NCCL connects with the first of them
    return group


def _exit() -> NoReturn:
    """Exit without waiting for threads: a read may hang, and others may be in a collective."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(0)


def _leave_ending_to_the_engine() -> None:
    """Ignore signals, so that only the engine decides when the worker ends: it may have to drain first.

    On Linux the kernel ends a worker with its engine, even if the worker's threads are stuck, or a fork of
    the engine keeps the socket open. A separate process group shields it from Ctrl-C. It is not a separate
    session, because then compiles of grammars could not give way to the worker by their nice value (sched(7),
    autogroup)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.setpgid(0, 0)
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, int(signal.SIGKILL))


def main() -> NoReturn:
    # Torch's warning; NumPy is not needed here.
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")
    _leave_ending_to_the_engine()
    rank, descriptor = map(int, sys.argv[1:])
    connection = socket.socket(fileno=descriptor)
    connection.set_inheritable(False)
    connection.setblocking(True)
    try:
        Worker(rank, connection).run()
    except BaseException:
        traceback.print_exc()
        os._exit(1)


if __name__ == "__main__":
    main()
