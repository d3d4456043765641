"""Writes into a slot while the model steps on others: in the calling thread alone, or on a CUDA stream."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from aioengine.model.slots.image import AdapterImage, Piece, serial_pieces


class SlotCopier(Protocol):
    """Carries out the writes of :class:`aioengine.model.slots.pool.LoRASlots`, one at a time."""

    def write(self, slot: Tensor, image: AdapterImage, *, zero: bool) -> None:
        """Copies an image into a slot [elements], zeroed before if asked. All is done when it returns."""

    def before_step(self) -> None:
        """Orders a step that is about to be enqueued after all writes that have returned."""

    def after_step(self) -> None:
        """Orders writes that come after a step that has just been enqueued."""


class SerialCopier:
    """For slots in CPU memory. Steps that read other slots go on in the other cores.

    A team of OpenMP threads for a copy would fight for the cores with the step's own team, so the copy
    is made of pieces that torch works on in the calling thread. They are handed over in one call, and the
    GIL is released throughout.
    """

    def __init__(self) -> None:
        self._targets: dict[int, tuple[tuple[Piece, ...], list[Tensor]]] = {}
        """By the slot's address: the views for the last write, since most adapters are alike."""

    def write(self, slot: Tensor, image: AdapterImage, *, zero: bool) -> None:
        if zero:
            torch._foreach_zero_(serial_pieces(slot))
        pieces, targets = self._targets.get(slot.data_ptr(), ((), []))
        if pieces != image.pieces:
            targets = _views(slot, image.pieces)
            self._targets[slot.data_ptr()] = image.pieces, targets
        torch._foreach_copy_(targets, image.sources)

    def before_step(self) -> None:
        return

    def after_step(self) -> None:
        return


def _views(slot: Tensor, pieces: tuple[Piece, ...]) -> list[Tensor]:
    wide = {dtype: slot.view(dtype) for dtype in {piece.dtype for piece in pieces}}
    views = []
    for piece in pieces:
        row = wide[piece.dtype]
        offset = row.storage_offset() + piece.slot
        views.append(row.as_strided((piece.rows, piece.width), (piece.pitch, 1), offset))
    return views


class StreamCopier:
    """For slots in CUDA memory: copies on a stream of their own, beside the steps.

    Images should be page-locked, or the copies are not asynchronous. A write returns when the device has
    finished it, known by an event on which the calling thread sleeps. That thread is never the step's:
    a step is ordered after finished writes by its stream, without the host waiting.
    In the other direction a write's stream waits for the step that was enqueued last: a request that was
    aborted leaves its slot idle while the device may still read it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # The pool was zeroed on the stream that is current now.
        self._stream.wait_stream(torch.cuda.current_stream(device))
        self._written: torch.cuda.Event | None = None
        self._stepped = torch.cuda.Event()  # type: ignore[no-untyped-call]
        """Recorded after each step; before the first one, waiting for it is waiting for nothing."""

    def write(self, slot: Tensor, image: AdapterImage, *, zero: bool) -> None:
        done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._stream.wait_event(self._stepped)
        with torch.cuda.stream(self._stream):
            if zero:
                slot.zero_()
            for block in image.blocks:
                shape, offset = (block.rows, block.width), slot.storage_offset() + block.slot
                target = slot.as_strided(shape, (block.pitch, 1), offset)
                source = image.data.as_strided(shape, (block.width, 1), block.image)
                target.copy_(source, non_blocking=True)
            done.record()
        done.synchronize()
        self._written = done

    def before_step(self) -> None:
        if self._written is not None:
            torch.cuda.current_stream(self._device).wait_event(self._written)

    def after_step(self) -> None:
        self._stepped.record(torch.cuda.current_stream(self._device))
