"""Virtual token counters: shares, weights, the lift, and what is remembered."""

from __future__ import annotations

import pytest
from support.policy_cases import order_of

from aioengine import events
from aioengine.core.state import Request
from aioengine.schedulers import compose
from aioengine.schedulers.policies import vtc
from aioengine.schedulers.policies.vtc import VTC
from aioengine.testing import LIMITS, Sim


def serial_sim(order: VTC, seqs: int = 1) -> Sim:
    limits = LIMITS._replace(max_num_seqs=seqs)
    return Sim(limits, compose(order=order))


def add(sim: Sim, tenant: str | None, prompt: int = 4, tokens: int = 4) -> Request:
    return sim.add(prompt=[7] * prompt, max_tokens=tokens, tenant=tenant)


def tenants_in_order(sim: Sim, requests: list[Request]) -> str:
    tenant = {r.id: r.options.tenant for r in requests}
    return "".join(str(tenant[i]) for i in order_of(sim) if i in tenant)


def test_cost_is_prompt_and_output_tokens_by_their_weights() -> None:
    order = VTC(input_weight=1.5, output_weight=3.0, weights={"y": 2.0})
    sim = serial_sim(order)
    add(sim, "x", prompt=6, tokens=5)
    sim.run()
    assert order.counter("x") == pytest.approx(1.5 * 6 + 3.0 * 5)
    add(sim, "y", prompt=6, tokens=5)  # lifted to x's counter when it comes
    sim.run()
    assert order.counter("y") - order.counter("x") == pytest.approx((1.5 * 6 + 3.0 * 5) / 2)


def test_a_client_with_twice_the_weight_gets_twice_the_service() -> None:
    sim = serial_sim(VTC(weights={"y": 2.0}))
    requests = [add(sim, "x") for _ in range(30)] + [add(sim, "y") for _ in range(30)]
    for _ in range(30 * 4):
        sim.settle()
    order = tenants_in_order(sim, requests)
    assert abs(order.count("y") - 2 * order.count("x")) <= 2


def test_idleness_is_not_saved_up() -> None:
    """Who comes late is served as often as the others from then on, not until it has caught up."""
    sim = serial_sim(VTC())
    requests = [add(sim, "x") for _ in range(40)]
    for _ in range(20 * 4):
        sim.settle()
    requests += [add(sim, "y") for _ in range(10)]
    sim.run()
    order = tenants_in_order(sim, requests)
    late = order[order.index("y") :]
    assert late[:12].count("y") <= 7


def test_without_a_tenant_the_adapter_is_the_client_then_the_base_model() -> None:
    order = VTC()
    sim = serial_sim(order)
    sim.register("lora")
    sim.add("lora", prompt=[3] * 5, max_tokens=2)
    sim.add(prompt=[3] * 3, max_tokens=1)
    sim.run()
    assert order.counter("lora") == 5 + 2 * 2
    assert order.counter("base") == 3 + 2 * 1


def test_preemption_is_not_charged_twice() -> None:
    order = VTC()
    sim = Sim(LIMITS._replace(num_blocks=16), compose(order=order))
    for i in range(4):
        sim.add(prompt=[20 + i] * 8, max_tokens=30, tenant="x")
    sim.run()
    assert sim.of(events.RequestPreempted), "the case is none"
    assert order.counter("x") == 4 * (8 + 2 * 30)


def test_clients_that_are_gone_are_forgotten_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vtc, "IDLE_LIMIT", 8)
    order = VTC()
    sim = serial_sim(order)
    names = [f"t{i}" for i in range(40)]
    for name in names:
        add(sim, name)
        sim.run()
    assert sum(order.counter(name) > 0 for name in names) <= 8 + 1
    assert order.counter(names[-1]) > 0, "what a newcomer would be lifted to"


def test_output_counts_as_it_is_generated() -> None:
    """Not only when a request ends: a long one that still runs weighs on its client."""
    sim = serial_sim(VTC(), seqs=2)
    long, short = add(sim, "x", prompt=6, tokens=40), add(sim, "y", prompt=4, tokens=12)
    waiting = [add(sim, tenant) for tenant in "xxyy"]
    while short.id not in sim.ended:
        sim.settle()
    sim.settle()
    assert long.id not in sim.ended, "and x has had as much output as y, and a longer prompt"
    assert tenants_in_order(sim, waiting) == "y"
