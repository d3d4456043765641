"""What the grammars of all tenants share: places for masks, and memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from aioengine.grammars.matching import largest_of_most
from aioengine.grammars.places import Places

ROWS = 6


def test_masks_left_behind_take_nobody_elses_places() -> None:
    places = Places(2 * ROWS + 8, 4)
    slow = [place for _ in range(100) if (place := places.take("slow")) is not None]
    assert len(slow) == ROWS + 4
    others = [places.take(name) for name in ("b", "b", None, "c")]
    assert None not in others and len({*slow, *others}) == len(slow) + 4
    for place in slow:
        places.give_back(place)
    assert places.take("slow") is not None
    places.close()


@given(st.lists(st.sampled_from([None, "a", "b", "c"]), min_size=ROWS, max_size=ROWS))
def test_every_row_of_a_batch_has_a_place(rows: list[str | None]) -> None:
    places = Places(2 * ROWS + 8, 4)
    assert None not in [places.take(tenant) for tenant in rows]
    places.close()


def grammar(memory: int, *users: str | None) -> Any:
    return SimpleNamespace(memory=memory, rows=dict(enumerate(users)))


def test_memory_is_taken_from_the_tenant_that_has_most() -> None:
    many = [grammar(20, "hog") for _ in range(5)]
    largest, shared = grammar(50, "b", "b"), grammar(60, "b", "hog")
    assert largest_of_most([*many, largest]) is many[0], "and not the largest of all"
    assert largest_of_most([*many, largest, shared]) is shared
    assert largest_of_most([largest, grammar(40, "c")]) is largest
    assert largest_of_most([grammar(1), largest]) is largest
