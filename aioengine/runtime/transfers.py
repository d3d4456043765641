"""Carries out the core's adapter moves beside the steps, and reports to the core."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from aioengine import errors, events
from aioengine.core import CopyMove, Core, DropMove, LoadMove, Move, StopMove
from aioengine.core.state import AdapterEntry
from aioengine.executors.base import Device
from aioengine.schedulers.policy import Location, SlotState
from aioengine.step import ReadOrder
from aioengine.tasks import Background

logger = logging.getLogger("aioengine")


class AdapterMoves:
    """Carries out the core's moves. ``changed`` is called after every report to the core."""

    def __init__(self, core: Core, device: Device, changed: Callable[[], None]) -> None:
        self._core = core
        self._device = device
        self._changed = changed
        self._moves = Background()
        """The reads and copies under way, those that are being cancelled included."""
        self._reads: dict[int, asyncio.Task[None]] = {}
        """The reads that were not stopped, by adapter uid."""

    def start(self, move: Move) -> None:
        match move:
            case DropMove(entry):
                self._device.drop(entry.uid)
            case LoadMove(entry):
                self._reads[entry.uid] = self._moves.spawn(self._load(entry), f"aioengine-load-{entry.label}")
            case StopMove(entry):
                self._reads.pop(entry.uid).cancel()
            case CopyMove(entry, slot, offset):
                self._moves.spawn(self._copy(entry, slot, offset), f"aioengine-copy-{entry.label}")

    async def stop(self) -> None:
        """Cancel the reads, one of which may hang, and wait for the copies, which cannot be interrupted."""
        for task in self._reads.values():
            task.cancel()
        while self._moves.tasks:
            await asyncio.wait(self._moves.tasks)
        for entry in self._core.residency.entries.values():
            if entry.location is Location.LOADING:
                self._core.residency.load_cancelled(entry)
        for slot in self._core.slots.slots:
            if slot.entry is not None and slot.state is SlotState.LOADING:  # lost with the device
                self._core.slots.cancel(slot.entry)

    def device_lost(self) -> None:
        """Forget the moves under way; call after ``core.device_lost``."""
        for task in self._moves.tasks:
            task.cancel()
        self._reads.clear()

    async def _load(self, entry: AdapterEntry) -> None:
        core, loop, task = self._core, asyncio.get_running_loop(), asyncio.current_task()
        failure: errors.AdapterError | None = None

        def stalled() -> None:
            if self._reads.get(entry.uid) is task:  # else it was given up, but has not been cancelled yet
                core.residency.load_stalled(entry)
                self._changed()

        files = None if entry.files is None else entry.files.files
        try:
            found = await self._device.load(ReadOrder(entry.uid, entry.label, entry.path, stalled, files))
        except errors.EngineDead:
            return  # the device was lost: the restart handles all moves together
        except errors.AdapterError as error:
            failure = error
            core.adapter_load_failed(entry, loop.time(), error, reason_of(error))
        except Exception as error:
            logged = unexpected(error, "unexpected ", entry.label, entry.path)
            core.adapter_load_failed(entry, loop.time(), logged, "internal")
        else:
            failure = core.adapter_loaded(entry, loop.time(), found)
        if failure is not None:
            log_failure(core.residency.names.of(entry.label).failures, entry.label, failure)
        self._reads.pop(entry.uid, None)
        self._changed()

    async def _copy(self, entry: AdapterEntry, slot: int, offset: int) -> None:
        loop = asyncio.get_running_loop()
        try:
            seconds = await self._device.place(entry.uid, slot, offset)
        except errors.EngineDead:
            return
        except Exception as error:
            what = f"could not be copied into slot {slot}: "
            failure = unexpected(error, what, entry.label, entry.path)
            self._core.adapter_place_failed(entry, loop.time(), failure)
        else:
            self._core.slots.placed(entry, loop.time(), seconds)
        self._changed()


def unexpected(
    error: BaseException, what: str, name: str, path: str | None = None
) -> errors.AdapterLoadError:
    """Return the error of an adapter for one that nobody expects, which is logged. ``what`` precedes its
    type."""
    text = f"{what}{type(error).__name__}: {error}"
    logger.error("adapter %r: %s", name, text, exc_info=error)
    found = errors.AdapterLoadError(text, name=name, path=path)
    found.__cause__ = error
    return found


def reason_of(error: errors.AioEngineError) -> events.LoadFailure:
    """Return what kind of failure an error is, for counting."""
    if isinstance(error, errors.ConfigError):
        return "internal"
    if isinstance(error, errors.AdapterTooLarge):
        return "too_large"
    return "invalid" if isinstance(error, errors.AdapterInvalid) else "io"


def log_failure(times: int, name: str, error: errors.AdapterError) -> None:
    """Log a failure if it is the 1st, 2nd, 4th, 8th, ... in a row, so that one adapter does not fill the
    log."""
    if times & (times - 1) == 0:
        text = str(error)
        again = f" (failed {times} times)" if times > 1 else ""
        data = {"adapter": name, "path": error.path, "reason": error.reason, "times": times}
        shown = text if text.isprintable() else repr(text)
        logger.warning("not loaded: %s%s", shown, again, extra={"data": data})
