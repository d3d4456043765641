"""Models whose modules choose by values, which a model without weights does not have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.any_models import COMMON, AnyModel, build_any
from support.served_models import check, engine_of
from torch import Tensor
from transformers.models import llama

from aioengine.model.files.resolve import read_spec
from aioengine.model.generic.spec import GenericSpec

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def in_groups(rows: Tensor, chosen: Tensor) -> Tensor:
    order = chosen.sort(stable=True)[1]
    groups = rows[order].split(torch.stack([~chosen, chosen]).sum(-1).tolist())
    out = torch.empty_like(rows)
    out[order] = torch.cat([groups[0], 2 * groups[1]])
    return out


def one_by_one(rows: Tensor, chosen: Tensor) -> Tensor:
    out = rows.clone()
    for i in chosen.nonzero():
        out[int(i.item())] *= 2
    return out


def by_a_mask(rows: Tensor, chosen: Tensor) -> Tensor:
    out = rows.clone()
    out[chosen] = 2 * rows[chosen]
    return out


def if_any(rows: Tensor, chosen: Tensor) -> Tensor:
    if not bool(chosen.any()):
        return rows
    return torch.where(chosen[:, None], 2 * rows, rows)


def as_many_as(rows: Tensor, chosen: Tensor) -> Tensor:
    factors = torch.ones(len(rows))
    for value in chosen.unique():
        factors[torch.where(chosen == value)[0]] = 1.0 + float(value)
    return rows * factors[:, None]


WAYS: list[Callable[[Tensor, Tensor], Tensor]] = [in_groups, one_by_one, by_a_mask, if_any, as_many_as]
"""All double the chosen rows."""


class ChoosingConfig(transformers.LlamaConfig):
    model_type = "doubles-some-rows"
    way: int = 0


class ChoosingMLP(llama.modeling_llama.LlamaMLP):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.way = WAYS[config.way]

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        rows = y.view(-1, y.shape[-1])
        return self.way(rows, rows[:, 0] > 0).view(y.shape)


class ChoosingForCausalLM(transformers.LlamaForCausalLM):
    config_class = ChoosingConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.layers[1].mlp = ChoosingMLP(config)


@pytest.fixture(params=range(len(WAYS)), ids=[way.__name__ for way in WAYS])
def choosing(request: pytest.FixtureRequest, tmp_path: Path) -> AnyModel:
    auto: Any = transformers
    auto.AutoConfig.register(ChoosingConfig.model_type, ChoosingConfig, exist_ok=True)
    auto.AutoModelForCausalLM.register(ChoosingConfig, ChoosingForCausalLM, exist_ok=True)
    return build_any(tmp_path, ChoosingConfig.model_type, **COMMON, way=request.param)


@pytest.mark.slow
async def test_they_are_served(choosing: AnyModel, tmp_path: Path) -> None:
    found, plain = (
        read_spec(folder, "transformers")
        for folder in (choosing.folder, build_any(tmp_path / "plain", "llama").folder)
    )
    assert isinstance(found, GenericSpec) and isinstance(plain, GenericSpec)
    for field in ("adapted", "kv", "layer_ids", "parameters", "flat"):
        assert getattr(found, field) == getattr(plain, field)
    async with engine_of(choosing.folder) as engine:
        await check(choosing, engine)
