"""The bound on copies is below what any choice of victims makes, and is met where sizes are equal."""

from __future__ import annotations

import pytest
from benchmarks.policies.fewest_copies import fewest_copies
from hypothesis import given, settings
from hypothesis import strategies as st


def tried_out(sizes: list[int], wanted: list[int], memory: int) -> int:
    """The fewest copies, found by trying every choice of what is kept."""
    reached = {frozenset[int](): 0}
    for name in wanted:
        after: dict[frozenset[int], int] = {}
        for held, copies in reached.items():
            others = sorted(held - {name})
            for chosen in range(2 ** len(others)):
                kept = [other for place, other in enumerate(others) if chosen >> place & 1]
                if sum(sizes[other] for other in kept) + sizes[name] <= memory:
                    now = frozenset([*kept, name])
                    after[now] = min(after.get(now, len(wanted)), copies + (name not in held))
        reached = after
    return min(reached.values())


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_choice_makes_fewer(data: st.DataObject) -> None:
    memory = data.draw(st.integers(3, 8))
    sizes = data.draw(st.lists(st.integers(1, memory), min_size=1, max_size=5))
    wanted = data.draw(st.lists(st.integers(0, len(sizes) - 1), min_size=1, max_size=12))
    assert fewest_copies(sizes, wanted, memory) <= tried_out(sizes, wanted, memory) + 1e-6


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=14), st.integers(1, 6))
def test_it_is_belady_s_rule_where_all_have_the_same_size(wanted: list[int], slots: int) -> None:
    held: set[int] = set()
    copies = 0
    for now, name in enumerate(wanted):
        if name not in held:
            copies += 1
            if len(held) == slots:
                rest = wanted[now + 1 :]
                held.remove(max(held, key=lambda other: rest.index(other) if other in rest else len(rest)))
            held.add(name)
    assert fewest_copies([1] * 6, wanted, slots) == pytest.approx(copies)
