"""The lab's merged weights: their cost, what they save, and who decides it."""

from __future__ import annotations

from typing import Any

import pytest
from support.lab_sim import Fixed, config, costs, play

from aioengine.config import LoRAConfig
from aioengine.lab.costs.model import CostModel, Stage
from aioengine.lab.costs.presets import load_costs
from aioengine.lab.costs.steps import StepCosts
from aioengine.lab.costs.view import ModelledCosts
from aioengine.lab.runs.rows import RequestRecord
from aioengine.lab.workload.requests import AdapterShape, Arrival
from aioengine.schedulers import load_policy

STEPS = StepCosts(step=0.01, lora_step=0.002)
"""A step takes 10 ms, and 2 ms more with an adapter beside the weights."""


def model_of(**fields: Any) -> CostModel:
    plain = Stage(latency=0.0, bandwidth=1e12)
    return costs(**{"steps": STEPS, "disk": plain, "slot": plain, **fields})


def run(policy: str, arrivals: list[Arrival], stage: Stage, **fields: Any) -> list[RequestRecord]:
    adapters = [AdapterShape("a", 8), AdapterShape("b", 8)]
    _, kept = play(Fixed(arrivals, adapters), load_policy(policy), model=model_of(merge=stage), **fields)
    return sorted(kept.requests, key=lambda record: record.arrival)


def test_an_adapter_that_is_alone_gets_faster_once_it_is_merged() -> None:
    arrivals = [Arrival(0.0, "a", 10, 500)]
    merge = Stage(latency=0.3, bandwidth=1e12)
    [plain] = run("fcfs", arrivals, merge, merge=True)
    assert plain.ended == pytest.approx(500 * 0.012, abs=0.03)
    [off] = run("dlora:alone=0", arrivals, merge)
    assert off.ended == plain.ended, "there is no memory for merged weights"
    [merged] = run("dlora:alone=0", arrivals, merge, merge=True)
    before = 0.3 / 0.002 * 0.012  # until the steps would have saved as much as a merge takes
    during = 0.3
    expected = before + during + (500 - before / 0.012 - during / 0.012) * 0.01
    assert merged.ended == pytest.approx(expected, abs=0.05)


def test_steps_are_slower_while_weights_are_made() -> None:
    merge = Stage(latency=1.2, bandwidth=1e12, slowdown=2.0)
    [record] = run("dlora:alone=0,payback=0", [Arrival(0.0, "a", 10, 500)], merge, merge=True)
    assert record.ended == pytest.approx(1.2 + (500 - 1.2 / 0.024) * 0.01, abs=0.1)


def test_others_do_not_wait_for_the_merged_adapter() -> None:
    arrivals = [Arrival(0.0, "a", 10, 2000), Arrival(15.0, "b", 10, 5), Arrival(16.0, None, 10, 5)]
    merge = Stage(latency=0.05, bandwidth=1e12)
    _, other, base = run("dlora:alone=0", arrivals, merge, merge=True)
    for record in (other, base):
        assert record.first_token is not None and record.first_token - record.arrival <= 0.05


def test_without_a_stage_a_merge_is_a_pass_that_reads_and_writes_beside_steps() -> None:
    linears = ((1.0, 0.004), (100.0, 0.008))
    model = costs(steps=StepCosts(step=0.01, linears=linears))
    assert model.merge_stage.slowdown == 2.0
    assert model.merge_stage.seconds(model.merged_nbytes) == pytest.approx(4 * 0.004)
    view = ModelledCosts(model, {}, 2048)
    assert view.merge("a") == pytest.approx(4 * 0.004)
    assert CostModel.from_json(model_of(merge=Stage(0.1, 1e9)).to_json()).merge == Stage(0.1, 1e9)


def test_the_plan_of_a_preset_counts_them() -> None:
    preset = load_costs("llama3-8b-h100")
    plain, merges = (preset.plan(config(merge=merge)) for merge in (False, True))
    assert merges.merged_bytes == preset.merged_nbytes == 2 * 6_979_321_856
    assert merges.num_blocks < plain.num_blocks
    assert LoRAConfig().merge is False
