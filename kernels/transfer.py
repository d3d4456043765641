"""Small tensors on their way to a device, without anybody waiting for them.

A copy to a GPU waits for all work before it, unless it comes from page-locked memory and is told not to.
On a CPU there is nothing to copy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_ALIGNMENT = 16
"""Bytes that parts of one buffer begin at multiples of: Triton loads such pointers 16 bytes at a time."""


def send(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """These tensors of the host on ``device``, all in one copy that is queued behind the work before it."""
    if device.type == "cpu":
        return list(tensors)
    packed = HostBuffer([(tensor.shape, tensor.dtype) for tensor in tensors], device)
    for view, tensor in zip(packed.host, tensors, strict=True):
        view.copy_(tensor)
    packed.send()
    return packed.device


class HostBuffer:
    """Tensors that lie side by side in memory of the host, and again on the device; on a CPU once.

    ``fields`` are shapes and dtypes.
    """

    def __init__(self, fields: Sequence[tuple[Sequence[int], torch.dtype]], device: torch.device) -> None:
        begins, size = [], 0
        for shape, dtype in fields:
            begins.append(size)
            size += -(-_count(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT

        def views(memory: Tensor) -> list[Tensor]:
            return [
                memory[begin : begin + _count(shape) * dtype.itemsize].view(dtype).view(*shape)
                for begin, (shape, dtype) in zip(begins, fields, strict=True)
            ]

        on_cpu = device.type == "cpu"
        self._host = torch.empty(size, dtype=torch.uint8, pin_memory=not on_cpu)
        self._device = self._host if on_cpu else torch.empty(size, dtype=torch.uint8, device=device)
        self._sent: torch.cuda.Event | None = None
        self.host = views(self._host)
        """Host tensors, to be written before :meth:`send`."""
        self.device = views(self._device)
        """Device tensors, to be read after :meth:`send`."""

    @property
    def nbytes(self) -> int:
        """Bytes of the device's copy."""
        return self._device.nbytes

    def wait(self) -> None:
        """Until the host's memory may be written again. The last copy was over long ago, if its step is."""
        if self._sent is not None:
            self._sent.synchronize()

    def send(self) -> None:
        """Queues the copy."""
        if self._device is self._host:
            return
        self._device.copy_(self._host, non_blocking=True)
        self._sent = torch.cuda.current_stream(self._device.device).record_event()


def _count(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
