"""Models that transformers runs, with quantized linears: exact relative to the weights in effect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.any_models import COMMON, AnyModel, build_any, config_of, randomize
from support.selection import mostly_slow
from support.served_models import check, engine_of, prompt
from torch import Tensor
from torch.nn import functional as F
from transformers.models import llama

from aioengine import EngineConfig, LoRAConfig, SamplingParams
from aioengine.errors import ConfigError
from aioengine.kernels import get_backend
from aioengine.memory_plan import plan_memory
from aioengine.model.build import build_runner
from aioengine.model.files.quantization import with_quantization
from aioengine.model.files.resolve import read_spec
from aioengine.model.generic.model import GenericModel
from aioengine.model.generic.spec import GenericSpec
from aioengine.model.runner import ModelRunner
from aioengine.model.spec import Quantization

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:The following .* keys did not match:RuntimeWarning"),
]
compiled = pytest.mark.skipif(get_backend("cpu").name != "cpu", reason="needs the CPU library")
FORMS: tuple[Quantization, ...] = ("int8", "int4", "fp8")
WIDE: dict[str, Any] = {"hidden_size": 64, "head_dim": 16}
ROOM = {"max_lora_rank": 8}
"""peft doubles the rank of a parameter that holds two linears."""
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**WIDE, "tie_word_embeddings": True},
    "gpt2": {"n_embd": 64},
    "gpt_neox": WIDE,
    "phi": {**WIDE, "vocab_size": 136},
    "falcon": {"hidden_size": 64},
    "deepseek_v3": {"hidden_size": 64},
}
"""Fused and tied weights, Conv1D, biases, a head that stays as it is, attention of its own."""


MOST = mostly_slow(MODELS, "llama", "deepseek_v3")


def runner_of(folder: Path, spec: GenericSpec, **fields: Any) -> ModelRunner:
    defaults: dict[str, Any] = {"dtype": torch.float32, "num_blocks": 20, "max_loras": 1, "max_lora_rank": 4}
    return build_runner(
        *(spec, folder), device="cpu", block_size=16, target_modules=spec.targets(None), max_model_len=64,
        **{**defaults, **fields},
    )  # fmt: skip


def spec_of(folder: Path) -> GenericSpec:
    spec = read_spec(folder, "transformers")
    assert isinstance(spec, GenericSpec)
    return spec


def take_effective(model: AnyModel, runner: ModelRunner) -> None:
    """Give the reference the weights that are in effect; all of them differ from what they were."""
    spec, decoder = runner.spec, runner.model
    assert isinstance(spec, GenericSpec) and isinstance(decoder, GenericModel)
    for linear in spec.linears:
        if linear.name not in spec.quantizable:
            continue
        module = model.reference.base_model.model.get_submodule(linear.name)
        parameter = getattr(module, "base_layer", module).weight
        weight = decoder.base_weight(linear.layer, linear.module)[0].whole()
        weight = weight if weight.shape == parameter.shape and is_linear(module) else weight.T
        assert not torch.equal(parameter.data, weight)
        parameter.data.copy_(weight)


def is_linear(module: Any) -> bool:
    return isinstance(getattr(module, "base_layer", module), torch.nn.Linear)


@pytest.mark.parametrize("kernels", [pytest.param("cpu", marks=compiled), "torch"])
@pytest.mark.parametrize("family", MOST)
@pytest.mark.slow
async def test_fp8(family: str, kernels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens, with adapters and without, are those of transformers and peft with the weights in effect."""
    monkeypatch.setenv("AIOENGINE_KERNELS", kernels)
    model = build_any(tmp_path, family, **MODELS[family])
    take_effective(model, runner_of(model.folder, spec_of(model.folder), quantization="fp8"))
    async with engine_of(model.folder, block_size=16, lora=ROOM, quantization="fp8") as engine:
        await check(model, engine)
        assert engine.info.quantization == "fp8"


@compiled
@pytest.mark.parametrize("form", ["int8", "int4"])
@pytest.mark.parametrize("family", MOST)
@pytest.mark.slow
async def test_codes_of_the_compiled_library(family: str, form: Quantization, tmp_path: Path) -> None:
    """It rounds activations to int8, too, so that log-probabilities differ a little."""
    model = build_any(tmp_path, family, **MODELS[family])
    take_effective(model, runner_of(model.folder, spec_of(model.folder), quantization=form))
    params = SamplingParams(max_tokens=0, prompt_logprobs=0)
    async with engine_of(model.folder, block_size=16, lora=ROOM, quantization=form) as engine:
        for name, folder in model.adapters.items():
            engine.register_adapter(name, folder)
        for i, name in enumerate([None, *model.adapters]):
            tokens = prompt(i, 23)
            scored = (await engine.complete(tokens, params, adapter=name)).prompt_logprobs
            assert scored is not None
            found = torch.tensor([entry.logprob for entry in scored[1:] if entry is not None])
            logits = model.logits(tokens, name)
            expected = logits.log_softmax(-1)[range(22), tokens[1:]]
            assert float((found - expected).abs().mean() / logits.abs().max()) < 0.02


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", MOST)
@pytest.mark.slow
def test_blocks_have_their_planned_bytes(family: str, form: Quantization, tmp_path: Path) -> None:
    """What is made for CUDA, by torch on a CPU; the probe compares it with the weights in effect."""
    model = build_any(tmp_path, family, **MODELS[family])
    spec = with_quantization(spec_of(model.folder), form, "cuda")
    assert isinstance(spec, GenericSpec) and {packing.format for packing in spec.packed.values()} == {form}
    config = EngineConfig(
        model=str(model.folder), model_impl="transformers", dtype="float32", device="cuda", quantization=form,
        lora=LoRAConfig(max_loras=1), kv_cache_memory="1MiB",
    )  # fmt: skip
    plan = plan_memory(spec, config, device="cuda", available_bytes=2**33)
    runner = runner_of(model.folder, spec, kernels="torch")
    assert runner.model.nbytes == plan.weights_bytes < spec.num_parameters() * 4
    take_effective(model, runner)


@compiled
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", MOST)
@pytest.mark.slow
def test_the_plan_for_a_cpu_is_exact(family: str, form: Quantization, tmp_path: Path) -> None:
    model = build_any(tmp_path, family, **MODELS[family])
    spec = spec_of(model.folder)
    for dtype in ("float32", "bfloat16"):
        config = EngineConfig(
            model=str(model.folder), model_impl="transformers", dtype=dtype, device="cpu", quantization=form,
            lora=LoRAConfig(max_loras=1), kv_cache_memory="1MiB",
        )  # fmt: skip
        plan = plan_memory(spec, config, device="cpu")
        runner = runner_of(model.folder, spec, quantization=form, dtype=getattr(torch, dtype))
        assert runner.model.nbytes == plan.weights_bytes


def test_which_linears_are_quantized(tmp_path: Path) -> None:
    """Those with sizes that are multiples of 16, all that read one input or none; not narrow ones."""
    fields = {**COMMON, "hidden_size": 512, "head_dim": 16, "vocab_size": 130, "intermediate_size": 48}
    config_of("jetmoe", **fields, num_local_experts=16, kv_channels=16).save_pretrained(tmp_path)
    spec = spec_of(tmp_path)
    assert any(name.endswith("router.layer") for name in (x.name for x in spec.linears))
    assert {name.rpartition(".")[2] for name in spec.quantizable} == {"kv_proj"}
    config_of("llama", **{**fields, "hidden_size": 40, "intermediate_size": 56}).save_pretrained(tmp_path)
    assert {name.rpartition(".")[2] for name in spec_of(tmp_path).quantizable} == set()


@pytest.mark.parametrize("form", FORMS)
def test_what_cannot_be_quantized_is_refused(form: Quantization, tmp_path: Path) -> None:
    model = build_any(tmp_path, "gpt2", n_embd=40)
    with pytest.raises(ConfigError, match=r"no linear that can be quantized.*set quantization='none'"):
        runner_of(model.folder, spec_of(model.folder), quantization=form)


@pytest.mark.parametrize("form", ["int8", "int4"])
@pytest.mark.parametrize("fields", [{"kernels": "torch"}, {"dtype": torch.float16}], ids=["torch", "float16"])
@pytest.mark.slow
def test_codes_need_the_compiled_library(form: Quantization, fields: dict[str, Any], tmp_path: Path) -> None:
    model = build_any(tmp_path, "gpt2", n_embd=64)
    with pytest.raises(ConfigError, match=r"compiled library .* set quantization='none'"):
        runner_of(model.folder, spec_of(model.folder), quantization=form, **fields)


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model: Any = randomize(transformers.AutoModelForCausalLM.from_config(config_of("gpt2", n_embd=64)))
    model.transformer.h[1].mlp.c_fc.weight.data[3, 4] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"h\.1\.mlp\.c_fc\.weight: a value is not finite"):
        runner_of(tmp_path, spec_of(tmp_path), quantization="fp8")


class PeekingConfig(transformers.LlamaConfig):
    model_type = "reads-a-weight-by-itself"


class PeekingMLP(llama.modeling_llama.LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        own: Tensor = super().forward(x)
        return own + F.linear(x, self.gate_proj.weight)[..., : own.shape[-1]]


class PeekingForCausalLM(transformers.LlamaForCausalLM):
    config_class = PeekingConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.layers[1].mlp = PeekingMLP(config)


@pytest.mark.parametrize("kernels", [pytest.param("cpu", marks=compiled), "torch"])
@pytest.mark.slow
def test_a_weight_that_is_read_beside_its_linear_is_expanded(kernels: str, tmp_path: Path) -> None:
    """The probe compares with the weights in effect."""
    auto: Any = transformers
    auto.AutoConfig.register(PeekingConfig.model_type, PeekingConfig, exist_ok=True)
    auto.AutoModelForCausalLM.register(PeekingConfig, PeekingForCausalLM, exist_ok=True)
    model = PeekingForCausalLM(PeekingConfig(**{**COMMON, **WIDE, "intermediate_size": 64}))
    randomize(model).save_pretrained(tmp_path)
    for form in ("none", "fp8"):
        decoder = runner_of(tmp_path, spec_of(tmp_path), kernels=kernels, quantization=form).model
        assert isinstance(decoder, GenericModel)
        weight = decoder.model.model.layers[1].mlp.gate_proj.weight
        stored = decoder.base_weight(1, "mlp.gate_proj")[0].whole()
        assert torch.equal(weight + 0, stored) and torch.equal(weight[3:5].T, stored[3:5].T)
