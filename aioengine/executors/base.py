"""Device: runs model steps and holds adapters, never on the event loop's thread."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from typing import Any

from aioengine.errors import EngineDead
from aioengine.step import LoadedAdapter, ReadOrder, StepBatch, StepResult

Ended = Callable[[StepResult | Exception], None]
"""Takes the result of a batch, or its error."""


class Device(ABC):
    """Runs steps, and moves adapters disk -> CPU cache -> slot beside them.

    All methods are called on the event loop and never block it. Adapters are named by ``uid``, a number that
    the core gives to each version of an adapter.

    A device may be lost: then steps, ``load`` and ``place`` end with EngineDead, and everything that was
    loaded, adapters and KV, is gone.
    """

    kernels: str = ""
    """Names of the kernels that compute the steps, for display."""
    variance: str | None = None
    """Reason why a token's bits depend on its batch; None if they do not."""
    repeats: bool = False
    """Whether it may take several steps of a batch at once: ``StepBatch.steps``."""
    restart: Callable[[], Coroutine[Any, Any, None]] | None = None
    """Starts it again with only the model, after a loss; None: that is not possible. Raises EngineDead if it
    fails for good. If it is cancelled, nothing runs."""
    forget: Callable[[str], None] | None = None
    """Notes that the request of this id has ended: it is in no further batch, and the id may be used again.
    None: it has no memory of requests."""
    on_loss: Callable[[EngineDead], None] | None = None
    """Called on the loop when it is lost, whether a step is in flight or not; set by who runs it."""

    @abstractmethod
    def begin(self, batch: StepBatch, ended: Ended) -> None:
        """Begin a batch, while none is in flight. ``ended`` is called on the loop, after this has returned,
        with the result or the error."""

    def settle(self) -> None:  # noqa: B027 # a device that takes one step at a time
        """Hand over the steps of a batch that have ended. Only where it ``repeats``."""

    def interrupt(self) -> None:  # noqa: B027 # a device that takes one step at a time
        """Begin no further step of the batch in flight, because the engine has something new to decide on.
        Only where it ``repeats``."""

    @abstractmethod
    async def load(self, order: ReadOrder) -> LoadedAdapter:
        """Read an adapter from disk, or from ``order.files``, into the CPU cache.

        Raises AdapterInvalid, AdapterTooLarge or AdapterLoadError.
        """

    @abstractmethod
    async def place(self, uid: int, slot: int, offset: int) -> float:
        """Copy an adapter from the CPU cache into a slot that nothing reads; returns the seconds it took."""

    @abstractmethod
    def drop(self, uid: int) -> None:
        """Free an adapter's memory in the CPU cache. A copy under way still completes."""

    @abstractmethod
    async def close(self) -> None:
        """Release threads, processes and memory. Cancel loads before. Safe to call twice."""


async def run_step(device: Device, batch: StepBatch) -> StepResult:
    """Run a batch on a device without an engine. Raises what the step raises."""
    done: asyncio.Future[StepResult | Exception] = asyncio.get_running_loop().create_future()

    def ended(result: StepResult | Exception) -> None:
        if not done.done():  # somebody waits still
            done.set_result(result)

    device.begin(batch, ended)
    result = await done
    if isinstance(result, Exception):
        raise result
    return result
