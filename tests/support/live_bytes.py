"""Counts the bytes of tensors that are alive, as the allocator of a device would."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class _Counting(TorchDispatchMode):
    """Counts every tensor that is made within it; a storage counts once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._uses: dict[int, int] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch would import its compiler, which takes seconds, to keep it out of this mode."""
        return False

    def __torch_dispatch__(
        self, function: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        old = {_storage(tensor) for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(out):
            key, nbytes = _storage(tensor), tensor.untyped_storage().nbytes()
            if key in old and key not in self._uses:  # a view of something that is not counted
                continue
            if key not in self._uses:
                self.now += nbytes
                self.peak = max(self.peak, self.now)
            self._uses[key] = self._uses.get(key, 0) + 1
            weakref.finalize(tensor, self._drop, key, nbytes)
        return out

    def _drop(self, key: int, nbytes: int) -> None:
        self._uses[key] -= 1
        if not self._uses[key]:
            del self._uses[key]
            self.now -= nbytes


def peak_of(work: Callable[[], object]) -> int:
    """Return the most bytes that are alive at a time while ``work`` runs, beside those that were before."""
    with _Counting() as counting:
        work()
    return counting.peak


def _tensors(value: object) -> list[Tensor]:
    """Return the tensors of a value, or in it."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for each in value for t in _tensors(each)] if isinstance(value, (list, tuple)) else []


def _storage(tensor: Tensor) -> int:
    return int(torch.Tensor.untyped_storage(tensor)._cdata)
