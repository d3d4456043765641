"""The pure core: a state machine without I/O, clock or torch."""

from aioengine.core.core import Core, CoreLimits, Step
from aioengine.core.residency import CopyMove, DropMove, LoadMove, Move

__all__ = ["CopyMove", "Core", "CoreLimits", "DropMove", "LoadMove", "Move", "Step"]
