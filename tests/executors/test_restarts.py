from __future__ import annotations

from aioengine.executors.process.device import RestartLimit


def test_the_first_is_at_once_others_wait_longer_and_longer_and_too_many_are_refused() -> None:
    limit = RestartLimit(4, 100.0)
    waits = [limit.next(float(now)) or 0.0 for now in range(4)]
    assert waits[0] == 0.0
    for wait, longest in zip(waits[1:], (0.5, 1.0, 2.0), strict=True):
        assert longest / 2 <= wait <= longest
    assert limit.next(99.0) is None
    assert limit.next(101.5) is not None, "two are out of the window"
    assert limit.next(1000.0) == 0.0
