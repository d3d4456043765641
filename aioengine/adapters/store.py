"""The CPU adapter cache's memory: packed adapters by uid. Who comes and goes is the core's decision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from aioengine.model.spec import ModelSpec

if TYPE_CHECKING:
    import torch

    from aioengine.adapters.peft import PackedAdapter


class AdapterStore:
    def __init__(
        self,
        spec: ModelSpec,
        *,
        max_rank: int,
        target_modules: Sequence[str],
        dtype: torch.dtype,
        pin_memory: bool = False,
    ) -> None:
        self._spec = spec
        self._max_rank = max_rank
        self._target_modules = tuple(target_modules)
        self._dtype = dtype
        self._pin_memory = pin_memory
        self._packed: dict[int, PackedAdapter] = {}

    def read(self, uid: int, name: str, path: str) -> PackedAdapter:
        """Read, validate and keep an adapter. Blocking: called in a loader thread.

        Raises the adapter errors of :func:`aioengine.adapters.peft.read_adapter`.
        """
        from aioengine.adapters.peft import read_adapter  # imports torch

        packed = read_adapter(
            name,
            path,
            self._spec,
            max_rank=self._max_rank,
            target_modules=self._target_modules,
            dtype=self._dtype,
            pin_memory=self._pin_memory,
        )
        self._packed[uid] = packed
        return packed

    def get(self, uid: int) -> PackedAdapter:
        return self._packed[uid]

    def drop(self, uid: int) -> None:
        """Free its memory. (A copy under way keeps what it reads alive.)"""
        del self._packed[uid]

    @property
    def nbytes(self) -> int:
        return sum(packed.nbytes for packed in self._packed.values())

    def __len__(self) -> int:
        return len(self._packed)
