"""Prefixes that requests pin: routers send the next request for one to where it is, for as long as it is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fleet_cases import Fleet, request

from aioengine.schedulers.routing import PinnedPrefix, RouterPolicy, load_router, prefix_pins
from aioengine.schedulers.routing.prefixes import MAX_HASHES, PREFIX_BLOCK, PrefixIndex

SECONDS = 300.0


def send(fleet: Fleet, router: RouterPolicy, name: str, pins: tuple[PinnedPrefix, ...]) -> str:
    """Send a request of 2,000 tokens for the base model, which ends at once; returns its replica."""
    asked = request(name, None, prompt_tokens=2000, pins=pins)
    replica = router.route(asked, fleet.state.view).replicas[0]
    fleet.state.sent(asked, replica)
    fleet.state.started(name, sum(pin.tokens for pin in pins[-1:]))
    fleet.state.ended(name)
    fleet.report(replica, received=1000, ended=1000, seconds_per_token=1e-3)
    return replica


@pytest.mark.parametrize("name", ["affinity", "prefix"])
def test_a_pinned_prefix_is_asked_for_where_it_is(name: str) -> None:
    fleet, router = Fleet(4), load_router(name)
    fleet.report_all(seconds_per_token=1e-3)
    pins = [prefix_pins([index] * 2000, [(1500, SECONDS)], None) for index in range(8)]
    first = [send(fleet, router, f"first-{index}", pin) for index, pin in enumerate(pins)]
    for _ in range(3):
        fleet.now += SECONDS - 1  # each use counts as the last one
        fleet.report_all(seconds_per_token=1e-3)
        again = [send(fleet, router, f"{fleet.now}-{index}", pin) for index, pin in enumerate(pins)]
        assert again == first
    fleet.state.leave("r0")
    moved = [send(fleet, router, f"moved-{index}", pin) for index, pin in enumerate(pins)]
    assert "r0" not in moved
    assert all(now == before for now, before in zip(moved, first, strict=True) if before != "r0")


def test_a_pin_that_was_not_granted_or_has_run_out_is_none() -> None:
    fleet, (pin,) = Fleet(2), prefix_pins([1] * 600, [(500, SECONDS)], "a")
    for name, tokens in (("q0", 0), ("q1", 480)):
        fleet.state.sent(request(name, "a", pins=(pin,)), "r1")
        assert fleet.state.view.pinned_tokens([pin]) == {"r1": 500}, "until its replica has answered"
        fleet.state.started(name, tokens)
        assert fleet.state.view.pinned_tokens([pin]) == ({"r1": tokens} if tokens else {})
        fleet.state.ended(name)
    fleet.now += SECONDS
    assert fleet.state.view.pinned_tokens([pin]) == {"r1": 480}
    fleet.now += 1
    assert fleet.state.view.pinned_tokens([pin]) == {}
    assert fleet.state.snapshot().pinned_tokens([pin]) == {}


lengths = st.integers(1, (MAX_HASHES + 2) * PREFIX_BLOCK)


@given(
    length=lengths,
    more=st.lists(st.integers(0, 3), max_size=5),
    changed=st.integers(0, MAX_HASHES * PREFIX_BLOCK - 1),
    others=st.lists(lengths, max_size=3),
)
def test_a_digest_stands_for_the_tokens_before_it(
    length: int, more: list[int], changed: int, others: list[int]
) -> None:
    prompt = list(range(length))
    (pin,) = prefix_pins(prompt, [(length, 1.0)], "a", salt="s")
    assert pin.tokens == length
    pins = prefix_pins(prompt + more, [(length, 2.0), *[(other, 1.0) for other in others]], "a", salt="s")
    assert pins[0].digest == pin.digest, "whatever follows, and whatever else is pinned"
    assert pin.digest not in {
        prefix_pins(prompt, [(length, 1.0)], adapter, salt=salt)[0].digest
        for adapter, salt in (("b", "s"), (None, "s"), ("a", None), ("a", "t"))
    }
    if changed < length:
        different = [*prompt[:changed], -1, *prompt[changed + 1 :]]
        assert prefix_pins(different, [(length, 1.0)], "a", salt="s")[0].digest != pin.digest


@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["add", "shorten", "leave", "wait"]),
            st.sampled_from(["r0", "r1", "r2"]),
            st.integers(0, 4),
            st.integers(0, 100),
        )
    ),
    most=st.integers(1, 4),
)
def test_the_index_knows_what_was_pinned_last(steps: list[tuple[str, str, int, int]], most: int) -> None:
    index, now = PrefixIndex(most), 0.0
    truth: dict[str, dict[int, tuple[float, int]]] = {"r0": {}, "r1": {}, "r2": {}}
    for what, replica, digest, number in steps:
        there = truth[replica]
        if what == "add":
            index.add(replica, digest, 50, now + number)
            there.pop(digest, None)
            there[digest] = (now + number, 50)
            if len(there) > most:
                del there[next(iter(there))]
        elif what == "shorten":
            index.shorten(replica, digest, number)
            if digest in there:
                there[digest] = there[digest][0], min(50, number)
        elif what == "leave":
            index.leave(replica)
            there.clear()
        else:
            now += number
        for digest in range(5):
            having = {name: known[digest] for name, known in truth.items() if digest in known}
            assert index.lookup([digest]) == {name: tokens for name, (_, tokens) in having.items()}
            lasting = {name: tokens for name, (until, tokens) in having.items() if until >= now and tokens}
            assert index.lasting([PinnedPrefix(digest, 50, 1.0)], now) == lasting
        assert len(index) == len(set().union(*truth.values()))
