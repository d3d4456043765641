"""Copies small tensors to a device without waiting.

A copy to a GPU waits for all earlier work, unless it comes from page-locked memory and is asynchronous. On a
CPU nothing is copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

_ALIGNMENT = 16
"""Alignment in bytes of the parts of one buffer: Triton loads from such pointers 16 bytes at a time."""


def send(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Return these tensors of the host on ``device``. All are in one copy, queued after earlier work."""
    if device.type == "cpu":
        return list(tensors)
    packed = HostBuffer([(tensor.shape, tensor.dtype) for tensor in tensors], device)
    for view, tensor in zip(packed.host, tensors, strict=True):
        view.copy_(tensor)
    packed.send()
    return packed.device


class HostBuffer:
    """Tensors side by side in memory of the host, and a copy of them on the device; on a CPU only once.

    ``fields`` are shapes and dtypes.
    """

    def __init__(self, fields: Sequence[tuple[Sequence[int], torch.dtype]], device: torch.device) -> None:
        begins, size = [], 0
        for shape, dtype in fields:
            begins.append(size)
            size += -(-prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT

        def views(memory: Tensor) -> list[Tensor]:
            return [
                memory[begin : begin + prod(shape) * dtype.itemsize].view(dtype).view(*shape)
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

    def wait(self) -> None:
        """Wait until the host's memory may be written again. If the last copy's step has ended, so has the
        copy."""
        if self._sent is not None:
            self._sent.synchronize()

    def send(self) -> None:
        """Queue the copy."""
        if self._device is self._host:
            return
        self._device.copy_(self._host, non_blocking=True)
        self._sent = torch.cuda.current_stream(self._device.device).record_event()
