"""A worker: one rank of the model in a separate process.

Started as ``python -m aioengine.executors.process.worker FD``. It exits at once when the other end of its
socket FD closes, and leaves nothing to clean up. The main thread receives requests. Steps run in one thread,
copies in another, and each read in its own, as with the thread device.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec

from aioengine.errors import DeviceError
from aioengine.executors.parts import build_parts, plan_parts, write_slot
from aioengine.executors.process import wire
from aioengine.executors.process.step_delta import StepDecoder
from aioengine.executors.process.worker_reads import Pause, WorkerReads
from aioengine.info import LoadProgress
from aioengine.memory_plan import MemoryPlan, memory_taken
from aioengine.model.cuda.failures import device_error
from aioengine.model.parallel.group import DistributedGroup, Group, Shard, SoloGroup
from aioengine.step import StepResult

if TYPE_CHECKING:
    from aioengine.adapters.store import AdapterStore
    from aioengine.model.runner import ModelRunner
    from aioengine.model.slots.image import AdapterImage

RECEIVE_BYTES = 1 << 20


class Worker:
    """A worker process. ``connection`` is the engine's socket. Its parts of the model exist after
    ``_build``."""

    _runner: ModelRunner
    _store: AdapterStore

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self._step_thread = ThreadPoolExecutor(1, thread_name_prefix="aioengine-step")
        self._copy_thread = ThreadPoolExecutor(1, thread_name_prefix="aioengine-copy")
        self._steps = StepDecoder()
        self._reads = WorkerReads(self._send)

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
                self._between_steps(number, lambda: self._step(message))
            case wire.Masks():
                self._steps.masks.put(message)
            case wire.Read():
                self._reads.read(number, message, self._store)
            case wire.Add():
                self._reads.add(number, message, self._store)
            case wire.Settle():
                self._reads.settle(message, self._store)
            case wire.Drop():
                self._store.drop(message.uid)
            case wire.Place():
                # Before the copy's turn: it may be dropped until then.
                image = self._store.get(message.uid)
                self._copy_thread.submit(self._place, number, message, image)
            case wire.Measure():
                self._between_steps(number, lambda: wire.Measured(memory_taken(self._plan.memory)))
            case wire.Start():
                self._between_steps(number, lambda: self._start(message))
            case wire.Build():
                self._between_steps(number, lambda: self._build(message))

    def _between_steps(self, number: int, work: Callable[[], object]) -> None:
        """Do ``work`` in the thread of the steps, and answer. If it fails, this worker cannot go on."""

        def run() -> None:
            try:
                report: wire.Report = wire.answer(number, work())
            except BaseException as error:
                report = _broken(device_error(error), error)
            self._send(report)

        self._step_thread.submit(run)

    def _start(self, start: wire.Start) -> MemoryPlan:
        import torch  # takes a second, in which the main thread already watches the engine

        from aioengine.model.parallel.threads import rank_threads

        torch.set_num_threads(start.threads or rank_threads(start.size))
        self._config = start.config
        lora = start.config.lora
        self._shard = Shard(start.rank, start.size, lora is not None and lora.fully_sharded_loras)
        self._plan = plan_parts(start.config, self._shard)
        self._group = _join(self._shard, self._plan.memory.device, start.rendezvous)
        return self._plan.memory

    def _build(self, build: wire.Build) -> wire.Built:
        memory = msgspec.structs.replace(self._plan.memory, num_blocks=build.num_blocks)
        watch = self._report_progress() if self._shard.rank == 0 else None
        built = build_parts(self._config, self._plan._replace(memory=memory), self._group, watch)
        self._runner, self._store = built
        gc.collect()
        gc.freeze()  # a full collection would visit all of it, within a step
        return wire.Built(self._runner.kernels, self._runner.variance)

    def _step(self, step: wire.Step) -> StepResult:
        result = self._runner.execute(self._steps.decode(step))
        return result if self._shard.rank == 0 else StepResult((), (), result.seconds)

    def _place(self, number: int, place: wire.Place, image: AdapterImage) -> None:
        try:
            report: wire.Report = wire.answer(
                number, write_slot(self._runner, image, place.slot, place.offset)
            )
        except DeviceError as error:
            report = _broken(error, error)
        except BaseException as error:
            report = wire.Failed(number, wire.pack_error(error))
        self._send(report)

    def _report_progress(self) -> LoadProgress:
        pause = Pause()

        def report(stage: str, done: int, total: int) -> None:
            if done >= total or pause.is_over():
                self._send(wire.Progress(stage, done, total))

        return report

    def _send(self, report: wire.Report) -> None:
        data = wire.frame(report)
        try:
            with self._sending:
                self._connection.sendall(data)
        except OSError:  # the engine is gone
            _exit()


def _broken(found: DeviceError | None, error: BaseException) -> wire.Broken:
    """Report ``found``, which stands for ``error``, or ``error`` itself. Errors of the package cross without
    their traceback, so it goes to the log."""
    if found is not None:
        traceback.print_exception(error)
    return wire.Broken(wire.pack_error(error if found is None else found))


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
    warnings.filterwarnings(
        "ignore", "Failed to initialize NumPy"
    )  # torch's warning; NumPy is not needed here
    _leave_ending_to_the_engine()
    connection = socket.socket(fileno=int(sys.argv[1]))
    connection.set_inheritable(False)
    connection.setblocking(True)
    try:
        Worker(connection).run()
    except BaseException:
        traceback.print_exc()
        os._exit(1)


if __name__ == "__main__":
    main()
