"""Every change in every state of a version: it leads where the table says, or is refused with a reason."""

from __future__ import annotations

from itertools import product

import pytest

from aioengine.core.adapters.version import (
    LIVES,
    STATES,
    Change,
    ChangeNotAllowed,
    Life,
    State,
    Version,
)

TO_STATE: dict[State, list[Change]] = {
    State.ON_DISK: [],
    State.LOADING: ["read"],
    State.STALLED: ["read", "stall"],
    State.ON_CPU: ["read", "arrive"],
    State.COPYING: ["read", "arrive", "copy"],
    State.IN_SLOT: ["read", "arrive", "copy", "place"],
}
TO_LIFE: dict[Life, list[Change]] = {
    Life.NEW: [],
    Life.CURRENT: ["publish"],
    Life.RETIRED: ["publish", "retire"],
    Life.FREED: ["retire", "free"],
}


@pytest.mark.parametrize(("state", "life", "change"), list(product(State, Life, [*STATES, *LIVES])))
def test_every_change_in_every_state(state: State, life: Life, change: Change) -> None:
    if life is Life.FREED and state is not State.ON_DISK:
        return  # there is no such version
    version = Version()
    for one in (*TO_STATE[state], *TO_LIFE[life]):
        version.change(one)
    assert (version.state, version.life) == (state, life)
    expected = STATES[change].get(state) if change in STATES else LIVES[change].get(life)
    if change in STATES and life is Life.FREED:
        expected = None
    if change == "free" and state is not State.ON_DISK:
        expected = None
    if expected is None:
        with pytest.raises(ChangeNotAllowed, match=f"^{change}: .*must"):
            version.change(change)
        assert (version.state, version.life) == (state, life)
    else:
        version.change(change)
        assert (version.state, version.life) == ((expected, life) if change in STATES else (state, expected))
    assert version.location is version.state.value[1]
    assert version.stalled == (version.state is State.STALLED)
    assert version.retired == (version.life in (Life.RETIRED, Life.FREED))
