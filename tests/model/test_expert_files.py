"""Experts: names, and adapters that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.any_models import config_of
from support.moe_adapters import PARAMETERS, MoeModel
from support.served_models import engine_of

from aioengine.errors import AdapterInvalid, AdapterTooLarge, ConfigError
from aioengine.model.files.resolve import read_spec

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


async def test_what_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    model = MoeModel(tmp_path, "olmoe")
    model.add_by_peft("good", 1, target_modules=[], target_parameters=PARAMETERS)
    folder = model.adapters["good"]
    text = (folder / "adapter_config.json").read_text()

    def edit(**fields: Any) -> None:
        (folder / "adapter_config.json").write_text(json.dumps(json.loads(text) | fields))

    async with engine_of(model.folder, model_impl="native") as engine:
        for fields, error, words in (
            ({"r": 2}, AdapterInvalid, r"expected shape \[8, 64\].*4 experts.*found \[12, 64\]"),
            ({"r": 5}, AdapterTooLarge, "experts.0.gate_proj has rank 5"),
            ({"target_parameters": PARAMETERS[:1]}, AdapterInvalid, r"experts\.lora_A.*expected shape"),
            ({"target_parameters": [*PARAMETERS, "mlp.gate.weight"]}, AdapterInvalid, "mlp.gate.lora_A"),
            ({"target_parameters": "gate_up_proj"}, AdapterInvalid, "expected a list"),
            ({"target_modules": ["down_proj"]}, AdapterInvalid, "in target_parameters and in target_mod"),
            ({"use_dora": True}, AdapterInvalid, "use_dora"),
        ):
            edit(**fields)
            with pytest.raises(error, match=words):
                await engine.load_adapter("bad", folder)
        edit()
        await engine.load_adapter("good", folder)
    lora = {"target_modules": ["q_proj"]}
    async with engine_of(model.folder, model_impl="native", lora=lora) as engine:
        with pytest.raises(AdapterInvalid, match=r"the slots do not hold experts\.gate_proj"):
            await engine.load_adapter("good", folder)


def test_what_is_not_native_is_left_to_transformers(tmp_path: Path) -> None:
    config_of("olmoe", clip_qkv=2.0).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="clip_qkv"):
        read_spec(tmp_path, "native")
    config_of("olmoe", num_experts_per_tok=9).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="num_experts_per_tok=9: must be <= num_experts=4"):
        read_spec(tmp_path, "native")


def test_names_of_modules(tmp_path: Path) -> None:
    config_of("qwen2_moe").save_pretrained(tmp_path)
    spec = read_spec(tmp_path, "native")
    for place in spec.adaptable():
        assert spec.find_module(spec.module_name(*place)) == place
    for name in (
        "model.layers.0.mlp.gate_proj",  # this layer has experts
        "model.layers.0.mlp.experts.4.gate_proj",
        "model.layers.0.mlp.experts.00.gate_proj",
        "model.layers.0.mlp.experts.0.q_proj",
        "model.layers.0.self_attn.gate",
        "model.layers.0.mlp",
    ):
        assert spec.find_module(name) is None, name
    experts = spec.targets(["experts"])
    assert len(experts) == 12 and spec.targets(["experts.3.down_proj"]) == experts[8:]
    with pytest.raises(ConfigError, match=r"\['gates'\] cannot be targeted; allowed: q_proj"):
        spec.targets(["gates"])
