"""Writes into a slot of a GPU while the model steps on others: on a CUDA stream."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Copy = tuple[Tensor, Tensor]
"""Target and source: two tensors of one size without gaps."""


class StreamCopier:
    """Carries out the writes of :class:`aioengine.model.slots.pool.LoRASlots`, one at a time, for slots in
    CUDA memory: on a separate stream, beside the steps.

    Images should be page-locked, or the copies are not asynchronous. A write returns when the device has
    finished it, known by an event on which the calling thread sleeps. That thread is never the step's:
    a step is ordered after finished writes by its stream, without the host waiting.
    In the other direction a write's stream waits for the step that was enqueued last: a request that was
    aborted leaves its slot idle while the device may still read it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call] # torch has no types for it
        # The table was zeroed on the stream that is current now.
        self._stream.wait_stream(torch.cuda.current_stream(device))
        self._written: torch.cuda.Event | None = None
        self._stepped = torch.cuda.Event()  # type: ignore[no-untyped-call] # torch has no types for it
        """Recorded after each step; before the first one, waiting for it is waiting for nothing."""

    def write(self, copies: Sequence[Copy], new: Sequence[Tensor] = ()) -> list[Tensor]:
        """Copy from CPU memory to the slots', and return copies of ``new`` there, in memory of their own.
        All is done when it returns."""
        # A new thread's device is the first one, where this process may have no business.
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call] # torch has no types for it
            self._stream.wait_event(self._stepped)
            try:
                for to, source in copies:
                    to.copy_(source, non_blocking=True)
                # Their memory is this stream's: it is written again only after the steps that read it.
                there = [tensor.to(self._device, non_blocking=True) for tensor in new]
            finally:  # the sources may be freed and reused after a failure, too
                done.record()
                done.synchronize()
        self._written = done
        return there

    def before_step(self) -> None:
        """Order a step that is about to be enqueued after all writes that have returned; called on the step's
        thread and stream, as :meth:`after_step` is."""
        if self._written is not None:
            torch.cuda.current_stream(self._device).wait_event(self._written)

    def after_step(self) -> None:
        """Order writes that come after a step that has just been enqueued."""
        self._stepped.record(torch.cuda.current_stream(self._device))
