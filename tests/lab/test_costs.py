from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from support.lab_sim import costs as costs_of

from aioengine.config import EngineConfig, LoRAConfig
from aioengine.errors import ConfigError
from aioengine.lab.costs.model import CostModel, FitQuality

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
    with pytest.raises(ConfigError, match=r"cannot read .*missing\.json"):
        CostModel.read(tmp_path / "missing.json")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["format"], 1, "format 1, but this aioengine reads cost models of format 3; calibrate again"),
        (["format"], 4, "format 4, but this aioengine reads cost models of format 3; upgrade"),
        (["stepps"], {}, "unknown field 'stepps' .did you mean 'steps'"),
        (["steps", "tokens"], 1.0, "unknown field `tokens`"),
        (["steps", "sequence"], -1e-9, r"steps\.sequence=-1e-09: must be >= 0"),
        (["steps", "linears"], [[1, 2, 3]], r"steps\.linears\[0\]=\[1, 2, 3\]: .*of length 2"),
        (["slot", "slowdown"], 0.5, r"slot\.slowdown=0\.5: must be >= 1"),
        (["device"], "tpu", "device='tpu': allowed are cpu, cuda"),
        (["device_memory"], 0, "device_memory=0: must be >= 1"),
        (["model", "num_layers"], 0, "model.num_layers=0: must be >= 1"),
        (["model", "layers"], 1, "unknown field 'layers'"),
    ],
)
def test_what_is_not_sound_is_refused(path: list[str], value: object, message: str, tmp_path: Path) -> None:
    values = msgspec.to_builtins(costs_of())
    place = values
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=f"^{file}: .*{message}"):
        CostModel.read(file)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"3", b"{}", b"\xff"])
def test_what_is_no_cost_model_is_refused(data: bytes, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_bytes(data)
    with pytest.raises(ConfigError, match=str(file)):
        CostModel.read(file)
