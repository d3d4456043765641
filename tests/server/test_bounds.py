"""Shares of what clients have in common, and the tables of bounds and waits."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from aioengine.server import bounds
from aioengine.server.bounds import Bound, Shares

DOCS = Path(__file__).resolve().parents[2] / "docs" / "testing.md"
OWNERS = st.sampled_from("abc")


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


def test_the_docs_have_the_bounds() -> None:
    text = DOCS.read_text(encoding="utf-8")
    for bound in (bounds.NUMBERS, bounds.UNREAD):
        size = f"{bound.most // 2**20} MiB" if bound.most > 2**22 else f"{bound.most:,}"
        assert size in text, bound
