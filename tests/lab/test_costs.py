from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.lab_sim import costs as costs_of

from aioengine.config import EngineConfig, LoRAConfig
from aioengine.errors import ConfigError
from aioengine.lab.costs.model import CostModel, FitQuality
from aioengine.lab.costs.steps import StepCosts

# Adapters, memory


@pytest.mark.parametrize("rank", [1, 8, 64])
def test_an_adapter_is_as_large_as_the_matrices_in_its_slot(rank: int) -> None:
    costs = costs_of()
    config = EngineConfig(
        model="any", kv_cache_memory="64MiB", lora=LoRAConfig(max_loras=1, max_lora_rank=rank)
    )
    plan = costs.plan(config)
    matrices = [part.nbytes for part in plan.parts if part.name.endswith("_proj")]
    assert costs.adapter_nbytes(rank) == sum(matrices)


def test_a_plan_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="too little"):
        costs_of(device_memory=2**20).plan(EngineConfig(model="any"))


# JSON


def test_file_round_trip(tmp_path: Path) -> None:
    costs = costs_of(source="\N{SNOWMAN}", fit=FitQuality(steps=3, median_error=0.01, p90_error=0.1))
    costs.write(tmp_path / "costs.json")
    assert CostModel.read(tmp_path / "costs.json") == costs
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
