"""A made-up cost model of a tiny one, for tests."""

from __future__ import annotations

from aioengine.lab.costs.model import CostModel, ModelShape, Stage
from aioengine.lab.costs.steps import StepCosts

MODEL = ModelShape(
    vocab_size=1000,
    hidden_size=64,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=96,
    max_position=512,
)


def costs_of(**fields: object) -> CostModel:
    values: dict[str, object] = {
        "name": "test",
        "source": "made up",
        "estimate": True,
        "model": MODEL,
        "steps": StepCosts(),
        "disk": Stage(0.01, 1e9),
        "slot": Stage(0.001, 1e10),
        "device": "cpu",
        "device_memory": 2**30,
    }
    return CostModel(**{**values, **fields})  # type: ignore[arg-type]
