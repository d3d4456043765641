"""Requests that have begun go on only with the content that they began with, whatever is in the files."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aioengine.request import RequestOptions

pytest.importorskip("ray.serve", reason="Ray has no wheel for this system or Python")

NAMES = st.text("ab-@+", min_size=1, max_size=3).filter(lambda name: "@" not in name)


@given(st.sets(NAMES, min_size=2, max_size=5), st.data())
def test_the_order_of_a_mix_is_that_of_its_names(names: set[str], data: st.DataObject) -> None:
    """With versions or without: so the sum has the same bits on every replica."""
    numbers = st.sampled_from(["", "@1", "@10"])
    mixes = [{name + data.draw(numbers): 0.5 for name in names} for _ in range(2)]
    orders = [[name.partition("@")[0] for name in RequestOptions(adapter=mix).named] for mix in mixes]
    assert orders[0] == orders[1] == sorted(names)
