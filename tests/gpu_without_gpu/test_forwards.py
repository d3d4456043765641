"""Forwards through the Triton kernels, on a GPU that computes nothing."""

from __future__ import annotations

import pytest
from support.fake_gpu import run_on_fake_gpu


@pytest.mark.slow
def test_nothing_is_compiled_after_the_start() -> None:
    """A kernel that is compiled while requests wait holds all of them up for up to a second."""
    at_start, later = run_on_fake_gpu("jit_keys", "2000")
    assert later == [] and at_start >= 10


@pytest.mark.slow
def test_ranks_exchange_the_same_in_the_same_order_in_recorded_and_played_steps() -> None:
    """Or they would wait for each other for ever; a graph plays back what was recorded."""
    for mode, (first, second) in run_on_fake_gpu("exchanges", "60").items():
        assert first == second, mode
        begin = first.index("step")
        assert not any(line.startswith("played") for line in first[:begin])
        steps = " ".join(first[begin:]).split("step")[1:]
        played = [step for step in steps if "played" in step]
        assert len(played) > 20 and len(steps) - len(played) > 5, "some are played, some are not"
        assert all(line.count("played") == line.count("sum") + line.count("gather") for line in played)
