"""The pure core: a state machine without I/O, clock or torch."""

from aioengine.core.adapters.moves import (
    CopyMove,
    DropMove,
    LoadMove,
    Move,
    StopMove,
)
from aioengine.core.core import Core, Step
from aioengine.core.limits import CoreLimits

__all__ = [
    "CopyMove",
    "Core",
    "CoreLimits",
    "DropMove",
    "LoadMove",
    "Move",
    "Step",
    "StopMove",
]
