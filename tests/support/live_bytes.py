"""Counts the bytes of tensors that are alive, as the allocator of a device would."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes:
    """``now`` and ``peak`` of the bytes of noted tensors; a storage counts once."""

    def __init__(self) -> None:
        self.now = self.peak = 0
        self._uses: dict[int, int] = {}
        self._sizes: dict[int, int] = {}

    def note(self, found: Iterable[Tensor], inputs: Iterable[Tensor] = ()) -> None:
        """Count tensors that an operation has made of ``inputs``, whose storages are not new."""
        old = {_storage(tensor) for tensor in inputs}
        for tensor in found:
            key = _storage(tensor)
            if key not in self._uses:
                if key in old:  # a view of something that is not counted
                    continue
                self._uses[key], self._sizes[key] = 0, tensor.untyped_storage().nbytes()
                self.now += self._sizes[key]
                self.peak = max(self.peak, self.now)
            self._uses[key] += 1
            weakref.finalize(tensor, self._drop, key)

    def _drop(self, key: int) -> None:
        self._uses[key] -= 1
        if not self._uses[key]:
            del self._uses[key]
            self.now -= self._sizes.pop(key)


class Counting(TorchDispatchMode):
    """Counts in ``live`` every tensor of a device that is made within it."""

    def __init__(self, live: LiveBytes, device: str) -> None:
        super().__init__()
        self._live, self._device = live, device

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch would import its compiler, which takes seconds, to keep it out of this mode."""
        return False

    def __torch_dispatch__(
        self, function: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        self._live.note(filter(self._is_there, tensors(out)), tensors((args, kwargs)))
        return out

    def _is_there(self, tensor: Tensor) -> bool:
        return tensor.device.type == self._device


def peak_of(device: str, work: Callable[[], object]) -> int:
    """Return the most bytes on ``device`` that are alive at a time while ``work`` runs, beside those that
    were before."""
    live = LiveBytes()
    with Counting(live, device):
        work()
    return live.peak


def tensors(value: object) -> list[Tensor]:
    """Return the tensors of a value, or in it."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for each in value for t in tensors(each)] if isinstance(value, (list, tuple)) else []


def _storage(tensor: Tensor) -> int:
    return int(torch.Tensor.untyped_storage(tensor)._cdata)
