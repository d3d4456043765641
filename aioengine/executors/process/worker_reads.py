"""A worker's reads of adapters from disk to the CPU cache, each in a thread of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from aioengine.adapters.loader import out_of_memory
from aioengine.adapters.read_threads import Progress
from aioengine.executors.process import wire

if TYPE_CHECKING:
    from aioengine.adapters.peft.dora_exchange import Draft
    from aioengine.adapters.store import AdapterStore
    from aioengine.model.slots.image import AdapterImage


TELL_SECONDS = 0.05
"""Minimum time between two reports that a read goes on."""


class _Told(Progress):
    """Progress that reports to the engine."""

    def __init__(self, send: Callable[[wire.Report], None], number: int) -> None:
        self._send = send
        self._number = number
        self._last = time.monotonic()

    def moved(self) -> None:
        super().moved()
        if time.monotonic() - self._last >= TELL_SECONDS:
            self._last = time.monotonic()
            self._send(wire.Reading(self._number))


class WorkerReads:
    """Reads of adapters in a worker. The main thread calls its methods; any thread calls ``send``.

    Finished reads wait here, by number, until they are kept or discarded. A read that is discarded while its
    thread runs is forgotten when the thread returns.
    """

    def __init__(self, send: Callable[[wire.Report], None]) -> None:
        self._send = send
        self._lock = threading.Lock()
        self._running: set[int] = set()
        self._unwanted: set[int] = set()
        self._drafts: dict[int, Draft] = {}
        self._images: dict[int, AdapterImage] = {}

    def read(self, request: wire.Read, store: AdapterStore) -> None:
        def work() -> None:
            try:
                draft = store.begin(
                    request.name, request.path, _Told(self._send, request.number), request.files
                )
                squares = draft.squares
                image = None if squares else store.finish(draft)
            except BaseException as error:
                self._failed(request.number, request.number, error, request.name, request.path)
                return
            self._end(request.number, draft if image is None else None, image)
            found = draft.packed
            self._send(
                wire.ReadDone(
                    request.number,
                    found.rank,
                    draft.nbytes,
                    found.digest,
                    found.version,
                    0 if found.head is None else len(found.head.weight),
                    found.invocation,
                    squares,
                    draft.slot_nbytes,
                    found.scalable,
                )
            )

        self._start(request.number, work)

    def add(self, request: wire.Add) -> None:
        self._drafts[request.number].add(request.begin, request.squares)

    def finish(self, request: wire.Finish, store: AdapterStore) -> None:
        draft = self._drafts.pop(request.read)

        def work() -> None:
            began = time.perf_counter()
            try:
                image = store.finish(draft)
            except BaseException as error:
                self._failed(request.read, request.number, error, draft.packed.name, draft.packed.path)
                return
            self._end(request.read, None, image)
            self._send(wire.Done(request.number, time.perf_counter() - began))

        self._start(request.read, work)

    def keep(self, request: wire.Keep, store: AdapterStore) -> None:
        store.put(request.uid, self._images.pop(request.number))

    def discard(self, request: wire.Discard) -> None:
        with self._lock:
            if request.number in self._running:
                self._unwanted.add(request.number)
            self._drafts.pop(request.number, None)
            self._images.pop(request.number, None)

    def _start(self, number: int, work: Callable[[], None]) -> None:
        with self._lock:
            self._running.add(number)
        threading.Thread(target=work, name=f"aioengine-load-{number}", daemon=True).start()

    def _end(self, number: int, draft: Draft | None, image: AdapterImage | None) -> None:
        with self._lock:
            self._running.discard(number)
            if number in self._unwanted:
                self._unwanted.discard(number)
                return
            if draft is not None:
                self._drafts[number] = draft
            if image is not None:
                self._images[number] = image

    def _failed(self, read: int, number: int, error: BaseException, name: str, path: str) -> None:
        self._end(read, None, None)
        if isinstance(error, (MemoryError, RuntimeError)):
            error = out_of_memory(error, name, path) or error
        self._send(wire.Failed(number, wire.WireError.of(error)))
