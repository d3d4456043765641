"""Quantized checkpoints with experts: tokens are those of transformers and peft with the expanded weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from support.moe_adapters import PARAMETERS, MoeModel
from support.quantized_checkpoints import (
    Quantize,
    awq,
    compressed,
    float8,
    gptq,
    int_quantized,
    pack_quantized,
)
from support.selection import mostly_slow
from support.served_models import check, engine_of

from aioengine import EngineConfig
from aioengine.errors import ConfigError
from aioengine.executors.parts import build_parts, plan_parts
from aioengine.kernels import available_backends
from aioengine.model.files.resolve import read_spec

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:The following .* keys did not match:RuntimeWarning"),
]
LINEARS = re.compile(r".*\.(w1|w2|w3|\w+_proj)\.weight")
ROUTERS_TOO = re.compile(r".*\.(w1|w2|w3|\w+_proj|gate|shared_expert_gate)\.weight")
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}


CASES: dict[str, tuple[str, dict[str, Any], Quantize, dict[str, Any], re.Pattern[str]]] = {
    "mixtral-gptq-act-order": (
        *("mixtral", {"intermediate_size": 64, "sliding_window": None, "num_local_experts": 8}),
        *(gptq(ordered=True), {**GPTQ, "desc_act": True, "dynamic": {"-:.*lm_head": {}}}, ROUTERS_TOO),
    ),
    "qwen3_moe-awq": (
        *("qwen3_moe", {"num_experts": 20, "norm_topk_prob": True}),
        *(awq(), {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, LINEARS),
    ),
    "qwen2_moe-float8-blocks": (
        *("qwen2_moe", {}),
        float8((24, 32), name="weight_scale_inv"),
        *({"quant_method": "fp8", "weight_block_size": [24, 32], "activation_scheme": "dynamic"}, LINEARS),
    ),
    "olmoe-w4a16": (
        *("olmoe", {"intermediate_size": 64}),
        *(
            pack_quantized(),
            compressed("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}),
        ),
        LINEARS,
    ),
    "qwen3_moe-w8a8": (
        *("qwen3_moe", {}),
        *(int_quantized, compressed("int-quantized", {"num_bits": 8, "strategy": "channel"}), LINEARS),
    ),
}


def build(root: Path, case: str) -> tuple[MoeModel, Path]:
    """A model with adapters, and its folder with quantized weights."""
    family, fields, quantize, config, wanted = CASES[case]
    model = MoeModel(root, family, **fields)
    packed = model.quantize(quantize, config, lambda name: wanted.fullmatch(name) is not None)
    model.add_by_peft("parameters", 3, target_modules=["v_proj"], target_parameters=PARAMETERS)
    model.add_by_module("dora", 8, (0, 1, 2), dora=True)
    return model, packed


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("case", mostly_slow(CASES, *list(CASES)[:2]))
@pytest.mark.slow
async def test_tokens_are_those_of_the_expanded_weights(
    case: str, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a setting, and with adapters, which are relative to these weights."""
    if backend not in available_backends("cpu"):
        pytest.skip("the CPU library cannot be built here")
    monkeypatch.setenv("AIOENGINE_KERNELS", backend)
    model, packed = build(tmp_path, case)
    spec = read_spec(packed, "native")
    kinds = {spec.kind_of(place[1]) for name in spec.packed if (place := spec.find_module(name))}
    assert {"experts", "o_proj"} <= {kind.split(".")[0] for kind in kinds}
    assert not kinds & {"gate", "shared_expert_gate"}, "routers are expanded"
    lora = {"max_loras": 2, "max_cpu_loras": 2, "max_lora_rank": 8}
    async with engine_of(packed, model_impl="auto", block_size=16, lora=lora) as engine:
        assert engine.info.model_impl == "native"
        assert engine.info.batch_invariant == (backend == "cpu"), "the compiled step runs it"
        await check(model, engine, alone=backend == "cpu")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.slow
def test_the_plan_is_to_the_byte(case: str, tmp_path: Path) -> None:
    _, packed = build(tmp_path, case)
    config = EngineConfig(
        model=str(packed), model_impl="native", max_model_len=64, device="cpu", dtype="float32",
        kv_cache_memory="1MiB",
    )  # fmt: skip
    planned = plan_parts(config)
    assert build_parts(config, planned).runner.model.nbytes == planned.memory.bytes_of("base weights")
    expanded = plan_parts(EngineConfig(model=str(tmp_path / "model"), device="cpu", dtype="float32"))
    assert planned.memory.bytes_of("base weights") < 0.5 * expanded.memory.bytes_of("base weights")


def test_methods_that_a_family_does_not_have(tmp_path: Path) -> None:
    for family, method, words in (
        ("olmoe", "mxfp4", "mxfp4.*not supported; supported: gptq"),
        ("gpt_oss", "gptq", "gpt_oss is supported in: MXFP4, or none"),
    ):
        folder = MoeModel(tmp_path / family, family, quantization_config={"quant_method": method}).folder
        with pytest.raises(ConfigError, match=words):
            read_spec(folder, "native")
