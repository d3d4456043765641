"""Each router does what it is named for, and says what its worst case is."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fleet_cases import Fleet, request

from aioengine.schedulers.registry import available
from aioengine.schedulers.routing import (
    DEFAULT_ROUTER,
    Move,
    Route,
    RouterGuard,
    RouterPolicy,
    Tiers,
    available_routers,
    load_placement,
    load_router,
)

ROUTERS = sorted(available_routers())
MEASURED = ("load_seconds", "slot_seconds", "seconds_per_token")


def test_all_are_there_and_say_where_they_are_from() -> None:
    assert {"round_robin", "least_loaded", "p2c", "holder", "tiers", "hrw", "shuffle", "prefix"} < set(
        ROUTERS
    )
    assert DEFAULT_ROUTER in ROUTERS
    for info in (*available_routers().values(), *available("placement").values()):
        assert info.summary and info.source and info.worst_case, info.name


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("afinity", "did you mean 'affinity'"),
        ("holder:spil=2", "did you mean 'spill'"),
        ("holder:spill=x", "spill='x'"),
        ("holder:spill=-1", "must be >= 0"),
        ("hrw:bound=0.5", "must be >= 1"),
        ("affinity:margin", "not of the form name=value"),
        ("no.such.module:Router", "cannot import"),
        ("collections:Counter", "not a subclass of RouterPolicy"),
    ],
)
def test_what_cannot_be_loaded_is_said(spec: str, says: str) -> None:
    with pytest.raises(ValueError, match="router '" + spec.replace(".", r"\.")) as caught:
        load_router(spec)
    assert says in str(caught.value)
    with pytest.raises(ValueError, match="known are"):
        load_placement("nowhere")


@pytest.mark.parametrize("name", ["least_loaded", "p2c"])
def test_a_burst_is_spread(name: str) -> None:
    """Before any report comes: by the gateway's own counts."""
    fleet, router = Fleet(4), load_router(name)
    counts = Counter(_send(fleet, router, f"q{index}", f"a{index}") for index in range(40))
    assert len(counts) == 4
    assert max(counts.values()) <= 14


def _send(fleet: Fleet, router: RouterPolicy, name: str, adapter: str | None, **fields: object) -> str:
    asked = request(name, adapter, **fields)
    chosen = router.route(asked, fleet.state.view).replicas[0]
    fleet.state.sent(asked, chosen)
    return chosen


def test_holder_follows_the_adapter_and_spills_only_if_told() -> None:
    fleet = Fleet(3)
    fleet.report("r1", Tiers(cpu=["a"]))
    assert {_send(fleet, load_router("holder"), f"q{i}", "a") for i in range(20)} == {"r1"}
    assert _send(fleet, load_router("holder:spill=8"), "q", "a") != "r1"


def test_tiers_prefers_the_slot_to_the_cpu() -> None:
    fleet = Fleet(3)
    fleet.report("r0", Tiers(slot=["x", "y"]))
    fleet.report("r1", Tiers(slot=["x", "y"], cpu=["a"]))
    fleet.report("r2", Tiers(slot=["a", "y"]))
    router = load_router("tiers")
    assert router.route(request(), fleet.state.view).replicas == ["r2", "r1", "r0"]


def test_hrw_moves_only_what_it_must_and_bounds_the_load() -> None:
    fleet, router = Fleet(5), load_router("hrw")
    names = [f"a{index}" for index in range(200)]
    before = {name: router.route(request(name, name), fleet.state.view).replicas[0] for name in names}
    assert set(before.values()) == {"r0", "r1", "r2", "r3", "r4"}
    fleet.state.leave("r3")
    after = {name: router.route(request(name, name), fleet.state.view).replicas[0] for name in names}
    assert {name for name in names if before[name] != after[name]} == {n for n in names if before[n] == "r3"}
    counts = Counter(_send(fleet, router, f"q{index}", "hot") for index in range(100))
    assert max(counts.values()) <= 32  # 1.25 x 25, rounded up


def test_a_hostile_tenant_reaches_its_shards_only() -> None:
    fleet, router = Fleet(8), load_router("shuffle:shards=2")
    reached = {_send(fleet, router, f"q{i}", f"a{i}", tenant="hostile") for i in range(100)}
    assert len(reached) == 2
    poison = request("poison", "a", tenant="hostile", tried=tuple(reached))
    assert router.route(poison, fleet.state.view).reject is not None
    others = [{_send(fleet, router, f"{t}-{i}", "a", tenant=f"t{t}") for i in range(20)} for t in range(20)]
    assert sum(shards == reached for shards in others) <= 2  # 1 in 28 on average


def test_prefix_goes_where_the_prompt_is_cached_unless_that_is_busy() -> None:
    fleet, router = Fleet(3), load_router("prefix:slack=4")
    first = _send(fleet, router, "q0", None, prompt_tokens=1024, prefixes=(1, 2, 3, 4))
    again = {
        _send(fleet, router, f"q{i}", None, prompt_tokens=1024, prefixes=(1, 2, 3, i)) for i in range(5, 8)
    }
    assert again == {first}
    fleet.report(first, running=20, received=4)
    assert _send(fleet, router, "q9", None, prompt_tokens=1024, prefixes=(1, 2, 3, 4)) != first


class TestAffinity:
    def test_takes_the_holder_until_its_queue_costs_more_than_loads_do(self) -> None:
        fleet, router = Fleet(3), load_router("affinity:margin=4")
        fleet.report_all()
        fleet.report("r1", Tiers(slot=["a"]))
        assert router.route(request(), fleet.state.view).reason == "holder"
        fleet.report("r1", waiting_tokens=15_000)  # 1.5 s of queue against 4 x 0.5 s
        assert router.route(request(), fleet.state.view).replicas[0] == "r1"
        fleet.report("r1", waiting_tokens=30_000)
        assert router.route(request(), fleet.state.view).replicas[0] != "r1"

    @pytest.mark.parametrize("speeds", [(1.0e-3, 1.2e-3), (1.0e-3, None)])
    @pytest.mark.parametrize("adapter", [None, "a"])
    def test_replicas_that_are_about_as_fast_take_turns(
        self, adapter: str | None, speeds: tuple[float, float | None]
    ) -> None:
        """Two measurements of the same speed are never equal, and one may be missing."""
        fleet, router = Fleet(2), load_router("affinity")
        for index, seconds in enumerate(speeds):
            fleet.report(f"r{index}", Tiers(slot=["a"]), seconds_per_token=seconds)
        asked = Counter(_send(fleet, router, f"q{i}", adapter, prompt_tokens=8) for i in range(48))
        assert min(asked["r0"], asked["r1"]) >= 22, asked

    @given(
        speeds=st.fixed_dictionaries(
            {
                "load_seconds": st.floats(1e-4, 1.0),
                "slot_seconds": st.floats(1e-4, 1.0),
                "seconds_per_token": st.floats(1e-6, 1e-2),
            }
        ),
        measured=st.lists(st.sets(st.sampled_from(MEASURED)), min_size=3, max_size=3),
        slot=st.booleans(),
        busy=st.integers(0, 1),
    )
    def test_an_idle_holder_is_first_whatever_was_measured(
        self, speeds: dict[str, float], measured: list[set[str]], slot: bool, busy: int
    ) -> None:
        """All are equally fast, and not all have measured it."""
        fleet, router = Fleet(3), load_router("affinity")
        for index, known in enumerate(measured):
            fields = {name: seconds if name in known else None for name, seconds in speeds.items()}
            work = {"waiting": 1, "running": 1, "waiting_for": {"b": 1}} if busy == index else {}
            fleet.report(f"r{index}", Tiers(), **fields, **work)
        holder = f"r{busy + 1}"
        known = measured[busy + 1]
        fields = {name: seconds if name in known else None for name, seconds in speeds.items()}
        fleet.report(holder, Tiers(slot=["a"]) if slot else Tiers(cpu=["a"]), **fields)
        assert router.route(request(), fleet.state.view).replicas[0] == holder

    def test_homes_grow_with_demand_and_shrink_later(self) -> None:
        fleet, router = Fleet(4), load_router("affinity")
        fleet.report_all()
        for index in range(400):  # 4 s of work a second
            fleet.now += 0.01
            _send(fleet, router, f"q{index}", "hot", prompt_tokens=400, max_tokens=1)
            fleet.state.ended(f"q{index}")
        asked = Counter(_send(fleet, router, f"p{index}", "hot") for index in range(100))
        assert len(asked) >= 3
        fleet.now += 600.0
        fleet.state = Fleet(4).state  # a fleet at rest
        assert router.route(request("z", "hot"), fleet.state.view).reason == "home"

    def test_the_plan_comes_before_the_hash(self) -> None:
        fleet, router = Fleet(4), load_router("affinity")
        fleet.report_all()
        for planned in ("r0", "r1", "r2", "r3"):
            fleet.state.planned(fleet.state.snapshot(), [Move("load", planned, planned)])
            assert router.route(request(adapter=planned), fleet.state.view).replicas[0] == planned

    def test_a_slow_and_a_silent_replica_are_gone_around(self) -> None:
        fleet, router = Fleet(2), load_router("affinity")
        for slow in ("r0", "r1"):
            fleet.report_all()
            fleet.report(slow, Tiers(slot=["a"]), seconds_per_token=0.1)
            assert router.route(request(), fleet.state.view).replicas[0] != slow
        fleet.report("r0", Tiers(slot=["a"]))
        fleet.now += 2.9
        fleet.report("r1", Tiers(slot=["a"]))
        assert router.route(request(), fleet.state.view).replicas[0] == "r1"


def test_the_router_of_the_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/policies.md, "Write a router", word for word."""
    text = (Path(__file__).parents[3] / "docs" / "policies.md").read_text(encoding="utf-8")
    block = text.split("<!-- router: the test-suite runs this block -->\n```python\n")[1].split("```")[0]
    (tmp_path / "my_router.py").write_text(block, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    router = load_router("my_router.py:FewestAdapters")
    fleet = Fleet(3)
    fleet.report("r1", Tiers(cpu=["a"]))
    guard = RouterGuard(router)
    assert guard.route(request(), fleet.state.view) == Route(["r1"], reason="holder")
    fleet.report("r0", waiting=2, waiting_for={"x": 1, "y": 1})
    assert guard.route(request(adapter="new"), fleet.state.view).replicas[-1] == "r0"
    assert not guard.failures
