"""Parts that policies are composed of: orderings, slot replacement, prefetch, preemption."""

from aioengine.schedulers.parts.base import Ordering, Part, Preemption, Prefetch, Replacement

__all__ = ["Ordering", "Part", "Preemption", "Prefetch", "Replacement"]
