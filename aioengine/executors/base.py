"""The executor interface: where model steps run. Never on the event loop's thread."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from aioengine.step import StepBatch, StepResult

if TYPE_CHECKING:
    from aioengine.model.slot_image import AdapterImage


class Executor(ABC):
    """Runs steps and writes slots. All methods are called on the event loop and never block it."""

    @abstractmethod
    async def execute(self, batch: StepBatch) -> StepResult:
        """Run one step. At most one is in flight."""

    @abstractmethod
    async def write_slot(self, slot: int, adapter: AdapterImage) -> float:
        """Copy an adapter from the CPU into a slot that nothing reads; returns the seconds it took."""

    @abstractmethod
    async def close(self) -> None:
        """Release threads, processes and device memory. Safe to call twice."""
