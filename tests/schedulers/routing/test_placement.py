"""Placement policies: copies by demand, few moves, balanced replicas."""

from __future__ import annotations

import pytest
from support.fleet_cases import Fleet, request

from aioengine.schedulers.routing import FleetState, Move, load_placement

PLANNED = ["hrw", "demand"]


def ask(fleet: Fleet, adapter: str, tokens: int) -> None:
    """So many tokens are asked of it, wherever they go."""
    fleet.state.sent(request(f"{adapter}-{fleet.now}", adapter, prompt_tokens=tokens, max_tokens=0), "r0")
    fleet.state.ended(f"{adapter}-{fleet.now}")


def plan(fleet: Fleet, name: str) -> list[Move]:
    snapshot = fleet.state.snapshot()
    moves = list(load_placement(name).plan(snapshot))
    fleet.state.planned(snapshot, moves)
    return moves


def targets(state: FleetState) -> dict[str, set[str]]:
    return {name: set(adapter.target_holders) for name, adapter in state.view.adapters.items()}


@pytest.mark.parametrize("name", PLANNED)
def test_a_hot_adapter_has_more_copies_and_nothing_moves_without_change(name: str) -> None:
    fleet = Fleet(4)
    for adapter, tokens in (("hot", 60_000), ("warm", 6000), ("cool", 6000)):
        ask(fleet, adapter, tokens)
    plan(fleet, name)
    found = targets(fleet.state)
    assert len(found["hot"]) == 4 and len(found["warm"]) == len(found["cool"]) == 1
    assert plan(fleet, name) == []


@pytest.mark.parametrize("name", PLANNED)
def test_what_nobody_asks_for_is_let_go(name: str) -> None:
    fleet = Fleet(2)
    ask(fleet, "a", 6000)
    plan(fleet, name)
    fleet.now += 3600.0
    ask(fleet, "b", 6000)
    moves = plan(fleet, name)
    assert {move.kind for move in moves if move.adapter == "a"} == {"unload"}
    assert targets(fleet.state)["a"] == set() and len(targets(fleet.state)["b"]) >= 1


@pytest.mark.parametrize("name", PLANNED)
def test_a_replica_that_left_is_made_up_for(name: str) -> None:
    fleet = Fleet(3)
    for index in range(12):
        ask(fleet, f"a{index}", 6000)
    plan(fleet, name)
    gone = next(iter(targets(fleet.state)["a0"]))
    kept = {name: held - {gone} for name, held in targets(fleet.state).items()}
    fleet.state.leave(gone)
    plan(fleet, name)
    after = targets(fleet.state)
    assert all(after[name] and gone not in after[name] for name in after)
    assert sum(not kept[name] <= after[name] for name in after) <= 2, "others were moved"


def test_demand_prefers_holders_and_balances_the_load() -> None:
    fleet = Fleet(4)
    for index in range(40):
        fleet.state.add_adapter(f"a{index}")
        ask(fleet, f"a{index}", 6000 + 100 * index)  # all are held by r0 now
    for index in range(40, 48):
        ask(fleet, f"a{index}", 6000)
    plan(fleet, "demand")
    counts = [
        sum(replica in held for held in targets(fleet.state).values()) for replica in ("r0", "r1", "r2", "r3")
    ]
    assert sum(counts) == 48
    assert counts[0] == max(counts) <= 24 and min(counts) >= 6, counts


@pytest.mark.parametrize("name", PLANNED)
def test_no_replica_no_plan(name: str) -> None:
    fleet = Fleet(1)
    ask(fleet, "a", 6000)
    fleet.state.leave("r0")
    assert plan(fleet, name) == []
