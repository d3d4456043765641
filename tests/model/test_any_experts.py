"""Adapters on experts and routers of models that transformers runs, against peft in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.any_models import WITHOUT_EFFECT
from support.moe_adapters import MoeModel
from support.served_models import check, engine_of

from aioengine import EngineConfig, LoRAConfig
from aioengine.errors import AdapterInvalid
from aioengine.memory_plan import plan_memory
from aioengine.model.build import build_runner
from aioengine.model.files.resolve import read_spec
from aioengine.model.generic.spec import GenericSpec

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:The following .* keys did not match:RuntimeWarning"),
]
NEW = 5
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
ROUTERS = {"gpt_oss": "router", "longcat_flash": "classifier", "granitemoe": "router", "afmoe": "router.gate"}
CASES: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"head_dim": 4, "n_group": 2, "topk_group": 1, "n_routed_experts": 6},
    "olmoe": {"num_experts_per_tok": 4},
    "mixtral": {"num_experts_per_tok": 1},
    "qwen2_moe": {"mlp_only_layers": [0], "num_hidden_layers": 3},
    "gpt_oss": {},
    "granitemoe": {},
    "longcat_flash": {"head_dim": 4},
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 8},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 0},
    "glm4_moe": {"n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "flex_olmo": {"num_experts": 4, "num_experts_per_tok": 2},
    "afmoe": {"num_experts": 4, "num_experts_per_tok": 2, "num_dense_layers": 1, "num_hidden_layers": 3},
}


def build(root: Path, family: str) -> MoeModel:
    """A model with adapters on all, on experts, on one parameter of theirs, and on routers."""
    model = MoeModel(root, family, **CASES[family])
    model.router = ROUTERS.get(family, "gate")
    model.add_by_peft("attention", 1, target_modules=r".*self_attn.*o_proj")
    others = WITHOUT_EFFECT.get(family)
    model.add_by_peft("all-linear", 2, target_modules="all-linear", exclude_modules=others)
    model.add_by_peft("parameters", 3, target_modules=[], target_parameters=EXPERTS)
    model.add_by_peft("down", 4, target_modules=[], target_parameters=EXPERTS[1:])
    if family != "longcat_flash":
        names = [f"{model.router}.weight", EXPERTS[0]]
        model.add_by_peft("router", 5, target_modules=[], target_parameters=names)
    return model


@pytest.mark.parametrize(
    ("family", "backend"),
    [*((family, "cpu") for family in CASES), ("deepseek_v3", "torch"), ("gpt_oss", "torch")],
)
@pytest.mark.slow
async def test_a_family(family: str, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All adapters side by side, with swaps; twice, so that slots and prefixes are reused."""
    monkeypatch.setenv("AIOENGINE_KERNELS", backend)
    model = build(tmp_path, family)
    lora = {"max_loras": 3, "max_cpu_loras": 3, "max_lora_rank": 8}
    async with engine_of(model.folder, lora=lora) as engine:
        assert engine.info.model_impl == "transformers"
        await check(model, engine)


@pytest.mark.parametrize("modules", [None, ["experts"], ["gate", "o_proj"], ["down_proj"]])
@pytest.mark.slow
def test_the_plan_is_exact(modules: list[str] | None, tmp_path: Path) -> None:
    model = MoeModel(tmp_path, "deepseek_v3", **CASES["deepseek_v3"])
    spec = read_spec(model.folder, "transformers")
    assert isinstance(spec, GenericSpec)
    lora = LoRAConfig(max_loras=2, max_lora_rank=4, target_modules=modules)
    config = EngineConfig(
        model=str(model.folder), model_impl="transformers", dtype="float32", kv_cache_memory="1MiB", lora=lora
    )
    plan = plan_memory(spec, config, device="cpu")
    targets = spec.targets(modules)
    assert spec.targets(targets) == targets
    runner = build_runner(
        *(spec, model.folder), dtype=torch.float32, device="cpu", num_blocks=plan.num_blocks, block_size=16,
        max_loras=2, max_lora_rank=4, target_modules=targets,
    )  # fmt: skip
    assert runner.lora_slots is not None
    assert plan.bytes_of("slot pool") == runner.lora_slots.nbytes
    assert plan.bytes_of("base weights") == runner.model.nbytes
    assert plan.bytes_of("KV blocks") == runner.kv_cache.nbytes
    assert len(list(plan.rows())) < 30, "experts are counted together"


async def test_what_does_not_fit_is_refused_with_what_to_do(tmp_path: Path) -> None:
    model = MoeModel(tmp_path, "olmoe")
    model.add_by_module("modules", 6, (0, 1, 2))
    model.add_by_peft("good", 1, target_modules=[], target_parameters=EXPERTS)
    async with engine_of(model.folder) as engine:
        with pytest.raises(AdapterInvalid, match="load it with PEFT and save it again"):
            await engine.load_adapter("modules", model.adapters["modules"])
        await engine.load_adapter("good", model.adapters["good"])
    async with engine_of(model.folder, lora={"target_modules": ["q_proj"]}) as engine:
        with pytest.raises(AdapterInvalid, match=r"the slots do not hold mlp\.experts\.gate_up_proj: add it"):
            await engine.load_adapter("good", model.adapters["good"])
