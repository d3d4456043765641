"""Shares of what clients have in common, and the tables of bounds and waits."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aioengine.cli.serve import ServerFlags
from aioengine.lab.simulation.clock import VirtualTimeLoop
from aioengine.server import bounds
from aioengine.server.bounds import CONNECTIONS, WAITS, Bound, Shares

DOCS = Path(__file__).resolve().parents[2] / "docs" / "security-testing.md"
OWNERS = st.sampled_from("abc")


def filled(shares: Shares, owner: str) -> int:
    """Take as many as there are for it; returns the number."""
    count = 0
    while shares.take(owner, 1):
        count += 1
    return count


def test_one_address_does_not_shut_others_out() -> None:
    shares = Shares(CONNECTIONS)
    assert [filled(shares, owner) for owner in "abcd"] == [3072, 768, 192, 48]
    assert shares.take("bystander", 1)
    shares.give_back("a", 3072)
    assert filled(shares, "b") > 0 and shares.take("a", 1)


@pytest.mark.parametrize(("most", "one"), [(1, 1), (2, 2), (3, 3), (8, 6)])
def test_small_bounds(most: int, one: int) -> None:
    assert filled(Shares(CONNECTIONS._replace(most=most)), "a") == one


@given(st.lists(st.tuples(OWNERS, st.integers(1, 1200), st.integers(0, 1200), st.booleans()), max_size=40))
def test_all_have_a_bound_and_one_owner_a_part_of_what_others_leave(
    asked: list[tuple[str, int, int, bool]],
) -> None:
    shares = Shares(Bound(1000, 0.5))
    held: list[tuple[str, int]] = []
    for owner, more, alone, ends in asked:
        if ends and held:
            shares.give_back(*held.pop(0))
            continue
        of: Counter[str] = Counter()
        for other, own in held:
            of[other] += own
        left = 1000 - (of.total() - of[owner])
        fits = of[owner] + more <= min(left, max((left + 1) // 2, alone))
        assert shares.take(owner, more, alone=alone) == fits
        if fits:
            held.append((owner, more))
        assert shares.held == sum(size for _, size in held) <= 1000
        assert shares.has(owner) == (of[owner] > 0 or fits)


@given(st.lists(st.tuples(OWNERS, st.integers(1, 1000), st.floats(0, 9), st.floats(0, 9)), max_size=30))
def test_what_waits_for_room_is_bounded_too(asked: list[tuple[str, int, float, float]]) -> None:
    """Who gets no room has waited for all of the time, or found too many waiting."""

    async def run() -> None:
        shares, loop = Shares(Bound(1000, 0.5)), asyncio.get_running_loop()
        held: list[int] = []
        waiting: list[int] = []

        async def one(owner: str, size: int, begins: float, lasts: float) -> None:
            await asyncio.sleep(begins)
            before, at = sum(waiting), loop.time()
            waiting.append(size)
            found = await shares.take_soon(owner, size, 5.0, alone=size)
            waiting.remove(size)
            if not found:
                waited = loop.time() - at
                assert before + size > 1000 if waited == 0 else waited == pytest.approx(5.0)
                return
            held.append(size)
            assert sum(held) <= 1000
            await asyncio.sleep(lasts)
            held.remove(size)
            shares.give_back(owner, size)

        await asyncio.gather(*(one(*each) for each in asked))
        assert await shares.take_soon("a", 1000, 5.0, alone=1000)  # all were given back

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(run())


def test_the_tables_name_settings_and_the_docs_have_their_rows() -> None:
    text = DOCS.read_text(encoding="utf-8")
    settings = {*ServerFlags.__dataclass_fields__}
    for what, (seconds, then) in WAITS.items():
        assert isinstance(seconds, float) or seconds in settings, what
        assert f"| {what} |" in text and then in text, what
    for bound in (bounds.INPUT, bounds.NUMBERS, bounds.UNREAD):
        size = f"{bound.most // 2**20} MiB" if bound.most > 2**22 else f"{bound.most:,}"
        assert size in text, bound
