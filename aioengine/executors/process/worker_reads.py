"""A worker's reads of adapters from disk to the CPU cache, each in a thread of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from aioengine.adapters.loader import out_of_memory
from aioengine.adapters.read_threads import Progress
from aioengine.executors.process import wire
from aioengine.step import LoadedAdapter

if TYPE_CHECKING:
    from aioengine.adapters.peft.dora import Draft
    from aioengine.adapters.store import AdapterStore
    from aioengine.model.slots.image import AdapterImage

REPORT_SECONDS = 0.05
"""Minimum time between two reports."""


class Pause:
    """The time between two reports to the engine that something goes on."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def is_over(self) -> bool:
        """Whether the next report may be sent; then the next pause begins."""
        if time.monotonic() - self._last < REPORT_SECONDS:
            return False
        self._last = time.monotonic()
        return True


class _Reported(Progress):
    """Progress that reports to the engine."""

    def __init__(self, report: Callable[[], None]) -> None:
        self._report = report
        self._pause = Pause()

    def moved(self) -> None:
        super().moved()
        if self._pause.is_over():
            self._report()


class _Read:
    """A read; first it has a draft, and when that is finished an image."""

    draft: Draft
    image: AdapterImage


class WorkerReads:
    """Reads of adapters in a worker. The main thread calls its methods; any thread calls ``send``.

    A read is here, by its number, until it is settled. Of one that is forgotten while its thread runs,
    nothing is left when the thread has ended.
    """

    def __init__(self, send: Callable[[wire.Report], None]) -> None:
        self._send = send
        self._reads: dict[int, _Read] = {}

    def read(self, number: int, order: wire.Read, store: AdapterStore) -> None:
        read = self._reads[order.read] = _Read()
        progress = _Reported(lambda: self._send(wire.Reading(number)))

        def work() -> wire.ReadDone:
            draft = store.begin(order.name, order.path, progress, order.files)
            squares, found = draft.squares, draft.packed
            if squares:
                read.draft = draft
            else:
                read.image = store.finish(draft)
            share = LoadedAdapter(
                found.rank,
                draft.slot_nbytes + (0 if found.head is None else found.head.nbytes),
                found.digest,
                labels=0 if found.head is None else len(found.head.weight),
                slot_nbytes=draft.slot_nbytes,
                invocation=found.invocation,
                scalable=found.scalable,
            )
            return wire.ReadDone(share, found.version, squares)

        self._start(number, work, order.name, order.path)

    def add(self, number: int, part: wire.Add, store: AdapterStore) -> None:
        read = self._reads[part.read]
        draft = read.draft
        draft.add(part.begin, part.squares)
        if not part.last:
            self._send(wire.answer(number, None))
            return
        del read.draft

        def work() -> None:
            read.image = store.finish(draft)

        self._start(number, work, draft.packed.name, draft.packed.path)

    def settle(self, order: wire.Settle, store: AdapterStore) -> None:
        read = self._reads.pop(order.read, None)
        if order.uid is not None and read is not None:
            store.put(order.uid, read.image)

    def _start(self, number: int, work: Callable[[], object], name: str, path: str) -> None:
        def run() -> None:
            try:
                report: wire.Report = wire.answer(number, work())
            except BaseException as error:
                if isinstance(error, (MemoryError, RuntimeError)):
                    error = out_of_memory(error, name, path) or error
                report = wire.Failed(number, wire.pack_error(error))
            self._send(report)

        threading.Thread(target=run, name=f"aioengine-load-{number}", daemon=True).start()
