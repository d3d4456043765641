from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.made_costs import costs_of

from aioengine.config import EngineConfig, LoRAConfig
from aioengine.errors import ConfigError
from aioengine.lab.costs.model import CostModel, FitQuality, Stage
from aioengine.lab.costs.steps import StepCosts

step_costs = st.builds(
    StepCosts,
    step=st.floats(0, 1),
    linears=st.tuples(st.floats(0, 1), st.floats(1, 2)).map(lambda ys: ((1.0, ys[0]), (8.5, ys[1]))),
    tile=st.integers(1, 512),
    adapter=st.floats(0, 1).map(lambda y: ((8.0, y), (64.0, 1e-6))),
)
stages = st.builds(Stage, st.floats(0, 10), st.floats(1, 1e12), st.floats(1, 10))
cost_models = st.builds(
    costs_of,
    name=st.text(),
    source=st.text(),
    estimate=st.booleans(),
    sources=st.dictionaries(st.text(), st.text(), max_size=3),
    steps=step_costs,
    step_overhead=st.floats(0, 1),
    disk=stages,
    slot=stages,
    device=st.sampled_from(["cpu", "cuda"]),
    device_memory=st.integers(1, 2**40),
    fit=st.none() | st.just(FitQuality(steps=3, median_error=0.01, p90_error=0.1)),
)

# Adapters, memory


@pytest.mark.parametrize("rank", [1, 8, 64])
def test_an_adapter_is_as_large_as_the_matrices_in_its_slot(rank: int) -> None:
    costs = costs_of()
    config = EngineConfig(
        model="any", kv_cache_memory="64MiB", lora=LoRAConfig(max_loras=1, max_lora_rank=rank)
    )
    plan = costs.plan(config)
    matrices = [size for part, size in plan.slot_parts.items() if part.endswith("_proj")]
    assert costs.adapter_nbytes(rank) == sum(matrices)


def test_a_plan_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="too little"):
        costs_of(device_memory=2**20).plan(EngineConfig(model="any"))


# JSON


@given(cost_models)
def test_json_round_trip(costs: CostModel) -> None:
    assert CostModel.from_json(costs.to_json()) == costs


def test_file_round_trip(tmp_path: Path) -> None:
    costs_of().write(tmp_path / "costs.json")
    assert CostModel.read(tmp_path / "costs.json") == costs_of()
    with pytest.raises(ConfigError, match=r"cannot read cost model .*missing\.json"):
        CostModel.read(tmp_path / "missing.json")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["format"], 1, "format 1, but this aioengine reads cost models of format 2; calibrate again"),
        (["format"], 3, "format 3, but this aioengine reads cost models of format 2; upgrade"),
        (["stepps"], {}, "unknown field 'stepps' .did you mean 'steps'"),
        (["steps", "tokens"], 1.0, "unknown field `tokens`"),
        (["steps", "sequence"], -1e-9, r">= 0.0 - at `\$\.steps\.sequence`"),
        (["steps", "linears"], [[1, 2, 3]], "Expected `array` of length 2"),
        (["slot", "slowdown"], 0.5, r">= 1.0 - at `\$\.slot\.slowdown`"),
        (["device"], "tpu", "Invalid enum value 'tpu'"),
        (["device_memory"], 0, r">= 1 - at `\$\.device_memory`"),
        (["model", "num_layers"], 0, r">= 1 - at `\$\.model\.num_layers`"),
        (["model", "layers"], 1, "unknown field `layers`"),
    ],
)
def test_what_is_not_sound_is_refused(path: list[str], value: object, message: str) -> None:
    values = json.loads(costs_of().to_json())
    place = values
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ConfigError, match=f"^my file: .*{message}"):
        CostModel.from_json(json.dumps(values).encode(), source="my file")


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"3", b"{}", b"\xff"])
def test_what_is_no_cost_model_is_refused(data: bytes) -> None:
    with pytest.raises(ConfigError, match="my file"):
        CostModel.from_json(data, source="my file")


def test_points_of_curves_are_one_on_a_line() -> None:
    costs = costs_of(steps=StepCosts(linears=((1.0, 0.5), (2.0, 1e-9 + 0.5))))
    assert b"[1.0, 0.5],\n" in costs.to_json()
