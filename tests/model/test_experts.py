"""Mixtures of experts that the native decoder runs, served: against transformers and peft in float32."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from support.mixed_adapters import check_mix
from support.moe_adapters import PARAMETERS, MoeModel
from support.selection import mostly_slow
from support.served_models import check, engine_of, prompt

from aioengine import EngineConfig, LoRAConfig, SamplingParams
from aioengine.executors.parts import build_parts, plan_parts
from aioengine.kernels.cpu.int4 import Int4Weight
from aioengine.kernels.cpu.quantized import QuantizedWeight

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:The following .* keys did not match:RuntimeWarning"),
]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {"sliding_window": 9}),
    "qwen2_moe": ("qwen2_moe", {}),
    "qwen3_moe": ("qwen3_moe", {"norm_topk_prob": True, "num_experts": 20}),
    "olmoe": ("olmoe", {"num_experts_per_tok": 3}),
    "gpt_oss": ("gpt_oss", {"sliding_window": 9, "swiglu_limit": 1.5}),
}
NEW = 5


def build(root: Path, case: str) -> MoeModel:
    """A model with an adapter of each form."""
    family, fields = CASES[case]
    model = MoeModel(root, family, **fields)
    model.add_by_peft("attention", 1, target_modules=["q_proj", "o_proj"])
    model.add_by_peft("all-linear", 2, target_modules="all-linear")
    model.add_by_peft("parameters", 3, target_modules=["v_proj"], target_parameters=PARAMETERS)
    model.add_by_peft("one-parameter", 4, target_modules=[], target_parameters=PARAMETERS[1:])
    model.add_by_peft(
        "router", 5, target_modules=["k_proj"], target_parameters=[f"mlp.{model.router}.weight"]
    )
    model.add_by_module("modules", 6, (0, 1, 2))
    model.add_by_module("up-alone", 7, (1,))
    model.add_by_module("dora", 8, (0, 2), dora=True)
    return model


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("case", mostly_slow(CASES, "qwen2_moe", "gpt_oss"))
@pytest.mark.slow
async def test_a_family(case: str, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All forms of adapters in mixed batches, with swaps; twice, so that slots and prefixes are reused."""
    monkeypatch.setenv("AIOENGINE_KERNELS", backend)
    model = build(tmp_path, case)
    lora = {"max_loras": 3, "max_cpu_loras": 3, "max_lora_rank": 8}
    async with engine_of(model.folder, model_impl="auto", block_size=16, lora=lora) as engine:
        assert engine.info.model_impl == "native"
        assert engine.info.batch_invariant == (backend == "cpu")
        await check(model, engine, alone=backend == "cpu")


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.usefixtures("cpu_library")
@pytest.mark.slow
async def test_mixes(backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Routers, experts and attention: each part in its slot, beside other adapters, against peft."""
    monkeypatch.setenv("AIOENGINE_KERNELS", backend)
    model = build(tmp_path, "qwen2_moe")
    mix = {"all-linear": 0.7, "attention": -0.4}
    tokens, params = prompt(3, 9), SamplingParams(max_tokens=NEW, ignore_eos=True, logprobs=1)
    lora = {"max_loras": 2, "max_cpu_loras": 2, "max_lora_rank": 8}
    async with engine_of(model.folder, model_impl="native", block_size=16, lora=lora) as engine:
        for name in mix:
            engine.register_adapter(name, model.adapters[name])
        output, *_ = await asyncio.gather(
            engine.complete(tokens, params, adapter=mix),
            engine.complete(tokens, params, adapter="attention"),
            engine.complete(prompt(5, 7), params, adapter={"all-linear": 0.5}),
        )
        alone = await engine.complete(tokens, params, adapter=mix)
        assert backend == "torch" or alone.logprobs == output.logprobs, "bits that depend on the batch"
    check_mix(model, mix, tokens, output)


FORMS: dict[str, type[QuantizedWeight]] = {"int8": QuantizedWeight, "int4": Int4Weight}


def round_weights(model: Any, quantization: str) -> None:
    """Gives what ``quantization`` covers the values that it has in effect."""
    form = FORMS[quantization]
    for name, parameter in model.named_parameters():
        stacked = parameter.dim() == 3  # [experts, out, in], and in GPT-OSS [experts, in, out]
        if not stacked and not name.endswith(("proj.weight", "lm_head.weight")):
            continue
        turned = stacked and model.config.model_type == "gpt_oss"
        weight = parameter.detach().transpose(-1, -2) if turned else parameter.detach()
        flat = weight.reshape(-1, weight.shape[-1]).contiguous()
        memory = torch.empty(form.packed_bytes(*flat.shape), dtype=torch.uint8)
        rounded = form.pack(flat.clone(), memory, int8_activations=False).rows(0, len(flat))
        weight.copy_(rounded.view(weight.shape))


@pytest.mark.parametrize("quantization", FORMS)
@pytest.mark.parametrize("case", mostly_slow(["mixtral", "qwen2_moe", "gpt_oss"], "gpt_oss"))
@pytest.mark.usefixtures("cpu_library")
async def test_quantized_experts(
    case: str, quantization: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the same model with the weights that are in effect, adapters included: they are of these."""
    # With int8 products activations are rounded, too (tests/kernels/test_expert_ops.py).
    monkeypatch.setattr("aioengine.model.native.has_int8_products", lambda: False)
    family, fields = CASES[case]
    model = MoeModel(tmp_path, family, **fields)
    round_weights(model.base, quantization)
    model.add_by_peft("parameters", 3, target_modules=["v_proj"], target_parameters=PARAMETERS)
    model.add_by_module("dora", 8, (0, 1, 2), dora=True)
    lora = {"max_loras": 2, "max_cpu_loras": 2, "max_lora_rank": 8}
    settings: dict[str, Any] = {"block_size": 16, "lora": lora, "quantization": quantization}
    async with engine_of(model.folder, model_impl="native", **settings) as engine:
        assert engine.info.batch_invariant
        await check(model, engine, alone=True)


@pytest.mark.parametrize("modules", [None, ["q_proj", "experts", "lm_head"]])
@pytest.mark.parametrize("quantization", ["none", *FORMS, "fp8"])
@pytest.mark.parametrize("case", mostly_slow(CASES, "qwen2_moe"))
@pytest.mark.usefixtures("cpu_library")
def test_the_plan_is_to_the_byte(case: str, quantization: Any, modules: Any, tmp_path: Path) -> None:
    family, fields = CASES[case]
    folder = MoeModel(tmp_path, family, **fields).folder
    lora = LoRAConfig(max_loras=2, max_lora_rank=4, target_modules=modules)
    config = EngineConfig(
        model=str(folder), model_impl="native", max_model_len=64, device="cpu", dtype="float32",
        kv_cache_memory="1MiB", quantization=quantization, lora=lora,
    )  # fmt: skip
    planned = plan_parts(config)
    plan, runner = planned.memory, build_parts(config, planned).runner
    assert runner.lora_slots is not None
    assert runner.model.nbytes == plan.bytes_of("base weights")
    assert runner.lora_slots.nbytes == plan.bytes_of("slot pool")
    assert len(list(plan.rows())) < 25, "experts are counted together"


async def test_adapters_in_int8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled step computes what torch does, and that is close to what is not rounded."""
    model = MoeModel(tmp_path, "qwen2_moe")
    model.add_by_module("modules", 6, (0, 1, 2), dora=True)
    tokens, params = prompt(3, 30), SamplingParams(max_tokens=0, prompt_logprobs=0)
    found: dict[str, torch.Tensor] = {}
    for backend in ("cpu", "torch"):
        monkeypatch.setenv("AIOENGINE_KERNELS", backend)
        lora = {"lora_dtype": "int8"}
        async with engine_of(model.folder, model_impl="native", block_size=16, lora=lora) as engine:
            engine.register_adapter("modules", model.adapters["modules"])
            scored = await engine.complete(tokens, params, adapter="modules")
        assert scored.prompt_logprobs is not None
        found[backend] = torch.tensor(
            [entry.logprob for entry in scored.prompt_logprobs if entry is not None]
        )
    torch.testing.assert_close(found["cpu"], found["torch"], rtol=1e-3, atol=1e-3)
    exact = model.logits(tokens, "modules").log_softmax(-1)[range(29), tokens[1:]]
    assert (found["cpu"] - exact).norm() < 0.05 * exact.norm()
