"""The executor interface: where model steps run. Never on the event loop's thread."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from aioengine.errors import EngineDead
from aioengine.step import StepBatch, StepResult


class Executor(ABC):
    """Runs steps. All methods are called on the event loop and never block it.

    What it runs on may be lost: then ``execute`` raises EngineDead, and everything that was loaded, adapters
    and KV, is gone.
    """

    can_restart: bool = False
    """Whether ``restart`` may bring it back."""

    @abstractmethod
    async def execute(self, batch: StepBatch) -> StepResult:
        """Run one step. At most one is in flight."""

    def forget(self, request_id: str) -> None:  # noqa: B027 # those without a memory need not
        """The request has ended: it is in no further batch, and its id may be another's."""

    def watch(self, lost: Callable[[EngineDead], None]) -> None:  # noqa: B027 # nor those that last
        """Have ``lost`` called, on the loop, when it is lost, be there a step in flight or not."""

    async def restart(self) -> None:
        """Only where ``can_restart``, and after it was lost: again with the model and nothing else.

        Raises EngineDead if that fails for good. If it is cancelled, nothing runs.
        """
        raise NotImplementedError

    @abstractmethod
    async def close(self) -> None:
        """Release threads, processes and device memory. Safe to call twice."""
