"""The metadata of decode steps at fixed addresses: what it holds, and that it stays where it is."""

from __future__ import annotations

from itertools import pairwise

import pytest

from aioengine.kernels import LoRABatch
from aioengine.kernels.triton.plan import cut
from aioengine.kernels.triton.recorded_step import most_tiles
from aioengine.model.cuda.working_memory import sizes


def test_sizes_of_steps() -> None:
    assert sizes(1) == [1]
    assert sizes(6) == [1, 2, 4, 6]
    assert sizes(64) == [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64]
    assert sizes(150) == [*sizes(64), 72, 80, 88, 96, 104, 112, 120, 128, 144, 150]
    for most in (1, 7, 64, 100, 256, 1000):
        found = sizes(most)
        assert found == sorted(set(found)) and found[-1] == most
        assert all(b - a <= max(8, b // 8) for a, b in pairwise(found))


@pytest.mark.parametrize("slots", [1, 3, 8, 64])
def test_tiles_fit_whatever_the_adapters_are(slots: int) -> None:
    for size in (1, 4, 16, 17, 40, 64):
        for used in range(1, min(slots, size) + 1):
            # The worst is one token for all but one adapter, and another short of a full tile.
            counts = [1] * (used - 1) + [size - used + 1]
            batch = LoRABatch(list(range(used)), counts, [4] * slots)
            assert len(cut(batch.segments, 16)) <= most_tiles(size, slots)
            even = [size // used + (i < size % used) for i in range(used)]
            batch = LoRABatch(list(range(used)), even, [4] * slots)
            assert len(cut(batch.segments, 16)) <= most_tiles(size, slots)
