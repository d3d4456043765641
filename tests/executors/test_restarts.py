from __future__ import annotations

from aioengine.executors.process.device import RestartLimit


def test_the_first_is_at_once_and_the_others_wait_longer_and_longer() -> None:
    limit = RestartLimit(4, 100.0)
    waits = [limit.next(float(now)) for now in range(4)]
    assert waits[0] == 0.0
    assert all(wait is not None and wait > 0 for wait in waits[1:])
    for wait, longest in zip(waits[1:], (0.5, 1.0, 2.0), strict=True):
        assert wait is not None and longest / 2 <= wait <= longest


def test_too_many_within_the_window_are_refused() -> None:
    limit = RestartLimit(2, 100.0)
    assert limit.next(0.0) == 0.0
    assert limit.next(60.0) is not None
    assert limit.next(99.0) is None
    assert limit.next(101.0) is not None, "the first is out of the window"
    assert limit.next(120.0) is None
    assert limit.next(1000.0) == 0.0
