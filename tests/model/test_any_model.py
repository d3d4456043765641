"""Models that transformers runs, served: against transformers and peft in float32, token for token."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from support.any_models import COMMON, FAMILIES, AnyModel, build_any, config_of, randomize
from support.selection import mostly_slow
from support.served_models import NEW, check, engine_of, prompt, refused
from transformers.models import llama

from aioengine import EngineConfig, SamplingParams
from aioengine.errors import AdapterInvalid, ConfigError
from aioengine.memory_plan import plan_memory
from aioengine.model.build import build_runner
from aioengine.model.files.resolve import read_spec
from aioengine.model.generic.model import GenericModel

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:The following .* keys did not match:RuntimeWarning"),
]


ROOM = {"max_lora_rank": 8}
"""peft doubles the rank of a parameter that holds two linears."""


@pytest.mark.parametrize("family", mostly_slow(FAMILIES, "gpt2", "falcon", "gemma2", "deepseek_v3"))
@pytest.mark.slow
async def test_a_family(family: str, tmp_path: Path) -> None:
    model = build_any(tmp_path, family)
    async with engine_of(model.folder, lora=ROOM) as engine:
        await check(model, engine)
        assert engine.info.model_impl == "transformers"


async def test_a_linear_that_gets_the_whole_past_takes_no_adapter(tmp_path: Path) -> None:
    """Doge makes a part of its mask of all values in the cache, by a linear. Nothing is keyed on its name."""
    model: Any = randomize(transformers.AutoModelForCausalLM.from_config(config_of("doge", num_experts=4)))
    model.save_pretrained(tmp_path / "model")
    adapters = {"plain": ["q_proj", "o_proj"], "all-linear": ["k_proj", "v_proj", "down_proj"]}
    adapters["past"] = ["dt_proj"]
    peft: Any = None
    for seed, (name, modules) in enumerate(adapters.items()):
        settings = LoraConfig(r=3 + seed, lora_alpha=8, target_modules=modules)
        if peft is None:
            peft = get_peft_model(model, settings, adapter_name=name)
        else:
            peft.add_adapter(name, settings)
    generator = torch.Generator().manual_seed(1)
    for key, parameter in peft.named_parameters():
        if "lora_" in key:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    peft.save_pretrained(tmp_path)
    served = {name: tmp_path / name for name in ("plain", "all-linear")}
    async with engine_of(tmp_path / "model") as engine:
        await check(AnyModel(tmp_path / "model", served, peft.eval()), engine)
        with pytest.raises(AdapterInvalid, match="dt_proj"):
            await engine.load_adapter("past", tmp_path / "past")


def test_a_model_without_linears_for_adapters_says_so(tmp_path: Path) -> None:
    """CPM-Ant puts tokens of its own before each sequence."""
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "dim_head": 8, "dim_ff": 48, "vocab_size": 128}
    config = config_of(
        "cpmant", **sizes, num_hidden_layers=2, prompt_length=4, prompt_types=4, segment_types=4
    )
    config.save_pretrained(tmp_path)
    engine = EngineConfig(model=str(tmp_path), dtype="float32", device="cpu", kv_cache_memory="1MiB")
    with pytest.raises(ConfigError, match=r"CpmAntForCausalLM has no linear that an adapter .* lora=None"):
        plan_memory(read_spec(tmp_path, "transformers"), engine, device="cpu")


async def test_a_model_type_that_only_the_native_decoder_takes(tmp_path: Path) -> None:
    model = build_any(tmp_path, "llama")
    edit(model.folder, model_type="unheard-of")
    await refused(model.folder, "'unheard-of'", "part of transformers")
    async with engine_of(model.folder, model_impl="auto") as engine:
        await check(model, engine)
        assert engine.info.model_impl == "native"


def edit(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def save(folder: Path, model: Any) -> Path:
    randomize(model).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("family", "fields", "word"),
    [
        ("t5", {"d_model": 32, "num_layers": 1, "vocab_size": 128}, "encoder-decoder"),
        ("mamba", {"hidden_size": 32, "num_hidden_layers": 1}, "keys and values"),
        ("granitemoehybrid", {"layer_types": ["linear_attention", "full_attention"]}, "keys and values"),
        ("vit", {"hidden_size": 32}, "no causal language model"),
    ],
)
@pytest.mark.parametrize("impl", mostly_slow(["transformers", "auto"], "auto"))
async def test_what_is_refused_before_weights_are_read(
    family: str, fields: dict[str, Any], word: str, impl: str, tmp_path: Path
) -> None:
    config_of(family, **fields).save_pretrained(tmp_path)
    await refused(tmp_path, word, model_impl=impl)


async def test_code_in_the_folder_is_not_run(tmp_path: Path) -> None:
    config_of("llama", **COMMON).save_pretrained(tmp_path)
    (tmp_path / "code.py").write_text("raise SystemExit('it was run')")
    names = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}
    edit(tmp_path, model_type="theirs", architectures=["Theirs"], auto_map=names)
    await refused(tmp_path, "trust_remote_code", "never run", "'theirs'")


async def test_a_model_that_sees_what_comes_after(tmp_path: Path) -> None:
    """An encoder with a head: transformers calls it a causal language model."""
    await refused(
        save(tmp_path, transformers.BertLMHeadModel(config_of("bert", **COMMON, is_decoder=False))),
        "does not compute the same",
    )


class MixingConfig(transformers.LlamaConfig):
    model_type = "mixes-neighbours"


class MixingForCausalLM(transformers.LlamaForCausalLM):
    """Its second layer adds the token before to each."""

    config_class = MixingConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        mlp = self.model.layers[1].mlp
        own = mlp.forward
        mlp.forward = lambda x: own(x) + x.roll(1, dims=1)


async def test_a_model_whose_tokens_meet_outside_of_attention(tmp_path: Path) -> None:
    auto: Any = transformers
    auto.AutoConfig.register(MixingConfig.model_type, MixingConfig, exist_ok=True)
    auto.AutoModelForCausalLM.register(MixingConfig, MixingForCausalLM, exist_ok=True)
    folder = save(tmp_path, MixingForCausalLM(MixingConfig(**COMMON)))
    await refused(folder, "MixingForCausalLM", "logits are off")


@pytest.mark.parametrize("fields", [{"batch_invariant": True}, {"lora": {"target_modules": ["gate_proj"]}}])
async def test_what_only_the_native_decoder_has(fields: dict[str, Any], tmp_path: Path) -> None:
    """``tests/engine/test_option_pairs.py`` has the others."""
    config_of("gpt2").save_pretrained(tmp_path)
    await refused(tmp_path, next(iter(fields.get("lora", fields))), model_impl="transformers", **fields)


async def test_adapters_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    model = build_any(tmp_path, "olmoe")
    adapter = model.adapters["plain"] / "adapter_config.json"
    adapter.write_text(json.dumps(json.loads(adapter.read_text()) | {"target_parameters": ["gate_up_proj"]}))
    async with engine_of(model.folder) as engine:
        with pytest.raises(AdapterInvalid, match=r"targets a parameter.*no .*experts\.lora_A"):
            await engine.load_adapter("plain", model.adapters["plain"])
        with pytest.raises(AdapterInvalid, match="unknown key"):
            await engine.load_adapter("other", build_any(tmp_path / "gpt2", "gpt2").adapters["plain"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"modules_to_save": ["lm_head"]}, "trained tokens .* only in models that the native decoder runs"),
        ({"target_modules": ["wte"]}, "lora_embedding_A': LoRA is supported on embed_tokens of models that"),
        ({"bias": "lora_only"}, "bias=.lora_only.: only 'none' is supported"),
    ],
)
@pytest.mark.slow
async def test_adapters_that_only_native_models_take_are_refused_with_the_reason(
    settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    model: Any = randomize(transformers.AutoModelForCausalLM.from_config(config_of("gpt2")))
    model.save_pretrained(tmp_path / "model")
    config = LoraConfig(**{"r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True, **settings})
    get_peft_model(model, config).save_pretrained(str(tmp_path / "adapter"))
    async with engine_of(tmp_path / "model") as engine:
        with pytest.raises(AdapterInvalid, match=words):
            await engine.load_adapter("a", tmp_path / "adapter")


async def test_a_bias_of_the_head_beside_an_adapter_on_it_is_refused_with_the_reason(tmp_path: Path) -> None:
    """PEFT saves all of a head that an adapter is on. The weight is compared; a head's bias is of no use."""
    model: Any = randomize(transformers.AutoModelForCausalLM.from_config(config_of("phi")))
    model.save_pretrained(tmp_path / "model")
    peft: Any = get_peft_model(model, LoraConfig(r=4, target_modules=["lm_head"]))
    peft.save_pretrained(str(tmp_path / "whole"))
    peft.save_pretrained(str(tmp_path / "lora"), save_embedding_layers=False)
    async with engine_of(tmp_path / "model", lora={"target_modules": ["lm_head"]}) as engine:
        with pytest.raises(AdapterInvalid, match=r"lm_head\.base_layer\.bias.*save_embedding_layers=False"):
            await engine.load_adapter("whole", tmp_path / "whole")
        await engine.load_adapter("lora", tmp_path / "lora")


def test_the_native_decoder_alone_refuses_other_models(tmp_path: Path) -> None:
    config_of("gpt2").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="architecture 'gpt2' is not supported"):
        read_spec(tmp_path, "native")
    spec = read_spec(tmp_path)
    assert spec.impl == "transformers" and "is not supported" in spec.ran_by
    with pytest.raises(ConfigError, match="GGUF"):
        read_spec(tmp_path / "model.gguf", "transformers")


def test_a_rope_that_depends_on_the_longest_sequence_bounds_the_length(tmp_path: Path) -> None:
    half = [1.0] * 4
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": half, "long_factor": half}
    config = config_of("phi3", rope_parameters=rope, original_max_position_embeddings=32)
    config.save_pretrained(tmp_path)
    assert read_spec(tmp_path).max_position == 32


async def test_embeddings_and_prompt_logprobs(tmp_path: Path) -> None:
    model, tokens = build_any(tmp_path, "gemma2"), prompt(5, 11)
    ids = torch.tensor([tokens])
    async with engine_of(model.folder) as engine:
        found = await engine.embed(tokens, normalize=False, pooling="last")
        scored = await engine.complete(tokens, SamplingParams(max_tokens=0, prompt_logprobs=0))
    with torch.no_grad(), model.reference.disable_adapter():
        out = model.reference(input_ids=ids, use_cache=False, output_hidden_states=True)
    torch.testing.assert_close(torch.tensor(found.vector), out.hidden_states[-1][0, -1], rtol=1e-4, atol=1e-4)
    expected = out.logits[0].log_softmax(-1)[range(10), tokens[1:]]
    assert scored.prompt_logprobs is not None
    values = [entry.logprob for entry in scored.prompt_logprobs[1:] if entry is not None]
    torch.testing.assert_close(torch.tensor(values), expected, rtol=1e-4, atol=1e-4)


async def test_the_language_model_of_one_that_sees(tmp_path: Path) -> None:
    """Text only; nothing is asked of its images."""
    text = {**FAMILIES["gemma3_text"], "vocab_size": 300}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=1,
        image_token_index=299,
        boi_token_index=297,
        eoi_token_index=298,
    )
    reference = randomize(transformers.Gemma3ForConditionalGeneration(config))
    reference.save_pretrained(tmp_path)
    tokens = prompt(3, 20)
    async with engine_of(tmp_path) as engine:
        output = await engine.complete(tokens, SamplingParams(max_tokens=NEW, ignore_eos=True))
    with torch.no_grad():
        logits = reference(torch.tensor([[*tokens, *output.token_ids[:-1]]]), use_cache=False).logits[0]
    assert output.token_ids == logits[len(tokens) - 1 :].argmax(-1).tolist()


class PeekingConfig(transformers.LlamaConfig):
    model_type = "reads-a-weight-by-itself"


class PeekingMLP(llama.modeling_llama.LlamaMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        own: torch.Tensor = super().forward(x)
        return own + torch.nn.functional.linear(x, self.gate_proj.weight)[..., : own.shape[-1]]


class PeekingForCausalLM(transformers.LlamaForCausalLM):
    config_class = PeekingConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.layers[1].mlp = PeekingMLP(config)


async def test_a_weight_that_is_read_beside_its_linear(tmp_path: Path) -> None:
    """It is packed; whatever else reads it gets a copy in the usual order."""
    auto: Any = transformers
    auto.AutoConfig.register(PeekingConfig.model_type, PeekingConfig, exist_ok=True)
    auto.AutoModelForCausalLM.register(PeekingConfig, PeekingForCausalLM, exist_ok=True)
    model = build_any(tmp_path, PeekingConfig.model_type, tie_word_embeddings=True)
    async with engine_of(model.folder) as engine:
        await check(model, engine)


def test_its_memory_is_free_when_it_is_gone(tmp_path: Path) -> None:
    folder = save(tmp_path, transformers.AutoModelForCausalLM.from_config(config_of("gpt_neox")))
    spec = read_spec(folder, "transformers")
    runner = build_runner(
        *(spec, folder), dtype=torch.float32, device="cpu", num_blocks=20, block_size=16,
        max_loras=1, max_lora_rank=4, target_modules=spec.targets(None),
    )  # fmt: skip
    assert isinstance(runner.model, GenericModel)
    weight = weakref.ref(runner.model.model.gpt_neox.layers[0].mlp.dense_h_to_4h.weight)
    gc.disable()
    try:
        del runner
        assert weight() is None
    finally:
        gc.enable()
