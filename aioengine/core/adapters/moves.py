"""Adapter moves: what the core asks its caller to do with an adapter's memory, beside the steps."""

from __future__ import annotations

from typing import NamedTuple

from aioengine.core.state import AdapterEntry


class LoadMove(NamedTuple):
    """Read an adapter from disk into CPU memory."""

    entry: AdapterEntry


class StopMove(NamedTuple):
    """Cancel the read under way, because the adapter is no longer needed."""

    entry: AdapterEntry


class CopyMove(NamedTuple):
    """Copy an adapter from CPU memory into a slot."""

    entry: AdapterEntry
    slot: int
    offset: int
    """Offset in the slots' memory, in bytes."""


class DropMove(NamedTuple):
    """Free an adapter's CPU memory."""

    entry: AdapterEntry


Move = LoadMove | StopMove | CopyMove | DropMove
