"""Division of a machine's threads among ranks."""

from __future__ import annotations

from aioengine.kernels.cpu.shared_library import threads


def rank_threads(size: int) -> int:
    """Return each of ``size`` ranks' share of the threads that a step here would have, at least 1."""
    return max(1, threads() // size)
