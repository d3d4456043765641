"""The search for block sizes, with a clock and limits of its own."""

from __future__ import annotations

from collections.abc import Callable

import triton
from hypothesis import given, settings
from hypothesis import strategies as st

from aioengine.kernels.triton.table import Key, ShrinkConfig, default_shrink
from benchmarks.gpu.tuning import descend

KEY = Key.of("shrink", 16, 64, 4096, 2048)


def shared_bytes(config: ShrinkConfig) -> int:
    return 2 * (config.block_m + config.block_r) * config.block_k * config.num_stages


@settings(max_examples=50, deadline=None, derandomize=True)
@given(limit=st.sampled_from([64, 99, 163, 227]), block_k=st.sampled_from([64, 128, 256]))
def test_a_start_that_does_not_fit_is_left(limit: int, block_k: int) -> None:
    """Prompts begin with decoding's inputs of a block, for which their tiles may be too large."""
    start = default_shrink(KEY)._replace(block_k=block_k)
    times: dict[ShrinkConfig, float] = {}

    def run(config: ShrinkConfig) -> float:
        if shared_bytes(config) > 1024 * limit:
            raise triton.OutOfResources(shared_bytes(config), 1024 * limit, "shared memory")
        return 1e6 / shared_bytes(config)  # the more bytes are under way, the faster

    def timer(work: Callable[[], object]) -> float:
        seconds = work()
        assert isinstance(seconds, float)
        return seconds

    def noted(config: ShrinkConfig) -> float:
        times[config] = run(config)
        return times[config]

    best = descend(start, KEY, noted, timer)
    assert isinstance(best, ShrinkConfig)
    assert times[best] == min(times.values()) and (best.block_k, best.split_k) == (block_k, start.split_k)
