"""Names that clients make up: a gateway's knowledge of them is bounded, whatever its placement policy."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from support.fleet_cases import Fleet, request

from aioengine.schedulers.routing import Move, Tiers, fleet

CHANGES = st.tuples(
    st.sampled_from(["send", "end", "report", "leave", "register", "remove", "load", "unload"]),
    st.sampled_from("abcdef"),
    st.integers(0, 1),
)


@given(st.lists(CHANGES, max_size=40))
def test_only_what_is_used_is_remembered(changes: list[tuple[str, str, int]]) -> None:
    known = Fleet(2)
    state, registered, runs = known.state, set[str](), dict[str, tuple[str, str]]()
    for number, (what, name, which) in enumerate(changes):
        replica = f"r{which}"
        if what == "send":
            state.sent(request(f"q{number}", name), replica)
            runs[f"q{number}"] = name, replica
        elif what == "end" and runs:
            first = next(iter(runs))
            state.ended(first)
            del runs[first]
        elif what == "report":
            known.report(replica, Tiers([name], nbytes={name: 8}), received=number)
        elif what == "leave":
            limits = fleet.ReplicaLimits(slots=2, max_running=8, kv_tokens=100)
            state.join(replica, limits)
            runs = {one: run for one, run in runs.items() if run[1] != replica}
        elif what == "register":
            state.add_adapter(name)
            registered.add(name)
        elif what == "remove":
            state.remove_adapter(name)
            registered.discard(name)
        elif what in ("load", "unload"):
            state.planned(state.snapshot(), [Move(what, name, replica)])  # type: ignore[arg-type]
        adapters = state.view.adapters
        used = {name for name, found in adapters.items() if found.holders or found.target_holders}
        used |= registered | {name for name, _ in runs.values()}
        assert used == adapters.keys()


def test_any_number_of_mixes() -> None:
    """A gateway without a placement policy makes no plans, and so nothing else would forget them."""
    known = Fleet(1)
    for number in range(100):
        known.now += 0.01
        known.state.sent(request("q", f"a*{number}"), "r0")
        known.report("r0", Tiers([f"a*{number}"]), received=number + 1)
        known.state.ended("q")
    assert len(known.state.view.adapters) <= 1
