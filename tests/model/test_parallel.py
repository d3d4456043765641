"""A model on several ranks against the same model on one: tokens, logits, what is held and what is sent."""

from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.parallel_ranks import (
    Phase,
    Ranks,
    Script,
    fail_in_exchange,
    hold,
    play,
    refusal,
    times_held,
    traffic,
)
from support.quantized_checkpoints import Quantize, float8, gptq, write_quantized
from support.selection import mostly_slow, mostly_slow_rows
from support.tiny_gguf import tiny_model, write_gguf
from support.tiny_models import ALL_MODULES, build_adapter, build_model

from aioengine.config import EngineConfig, LoRAConfig
from aioengine.errors import ConfigError
from aioengine.executors.parts import plan_parts
from aioengine.model.files.resolve import read_spec
from aioengine.model.parallel.group import Shard, SoloGroup
from aioengine.model.parallel.partition import Partition
from aioengine.model.slots.layout import SlotLayout
from aioengine.model.spec import EMBEDDING_MODULES, LORA_MODULES, ModelSpec, Quantization

pytestmark = [
    pytest.mark.usefixtures("preloaded_workers"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # peft's, of biases and tied heads
]

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {"vocab_size": 257}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "one-kv-head": ("llama", {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True}),
    "granite": ("granite", {}),
    "gemma2": ("gemma2", {"attention_bias": True}),
    "gemma3": ("gemma3_text", {}),
    "phi3": ("phi3", {"attention_bias": True}),
    "glm4": ("glm4", {"attention_bias": True}),
    "phi3-by-three": ("phi3", {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 96}),
    "by-three": ("llama", {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 96}),
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "rank-4": {"r": 4},
    "rank-16": {"r": 16, "lora_alpha": 16},
    "rank-5": {"r": 5, "target_modules": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]},
    "rank-1": {"r": 1, "target_modules": ["k_proj", "o_proj"]},
    "dora": {"r": 7, "use_dora": True, "target_modules": [*ALL_MODULES, "embed_tokens", "lm_head"]},
    "bias": {"r": 8, "lora_bias": True, "target_modules": ["q_proj", "o_proj", "down_proj", "lm_head"]},
    "outer": {"r": 6, "target_modules": ["embed_tokens", "lm_head", "gate_proj"]},
}
IN_ONE = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
}
"""What some families have in the place of several linears."""


@functools.cache
def model_of(root: Path, name: str) -> Path:
    family, overrides = MODELS[name]
    return build_model(root / name, family, **overrides)


@functools.cache
def adapter_of(root: Path, model: str, name: str) -> Path:
    folder, options = root / f"{model}-{name}", dict(ADAPTERS[name])
    known = read_spec(model_of(root, model)).layer_modules
    asked = [
        IN_ONE.get(m, m) if IN_ONE.get(m) in known else m for m in options.get("target_modules", ALL_MODULES)
    ]
    options["target_modules"] = list(dict.fromkeys(asked))
    return build_adapter(model_of(root, model), folder, seed=list(ADAPTERS).index(name), **options)


def targetable(spec: ModelSpec) -> tuple[str, ...]:
    return spec.layer_modules + EMBEDDING_MODULES


def prompt(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(3, 256), k=length)


@functools.cache
def script_of(root: Path, model: str, kernels: str) -> Script:
    """All adapters, base rows beside them; slots are rewritten by other ranks and kinds while others run."""
    adapters = functools.partial(adapter_of, root, model)
    first = {0: adapters("rank-4"), 1: adapters("rank-16"), 3: adapters("dora")}
    return Script(
        model_of(root, model),
        [
            Phase(first, [(prompt(1, 20), -1), (prompt(2, 7), 0), (prompt(3, 25), 1), (prompt(4, 9), 3)]),
            Phase({0: adapters("rank-5"), 2: adapters("bias")}, [(prompt(5, 4), 0), (prompt(6, 12), 2)]),
            Phase({3: adapters("rank-1"), 1: adapters("outer")}, [(prompt(7, 3), 3), (prompt(8, 16), 1)]),
            Phase({1: adapters("rank-4")}, [(prompt(3, 25), 1), (prompt(9, 2), -1)]),
        ],
        max_loras=4,
        kernels=kernels,
        target_modules=targetable(read_spec(model_of(root, model))),
    )


@functools.cache
def alone(root: Path, model: str, kernels: str) -> Any:
    return play(SoloGroup(), script_of(root, model, kernels))


def check(
    ranks: Ranks,
    root: Path,
    model: str,
    fully_sharded: bool,
    kernels: str = "torch",
    *,
    compiled: bool = False,
) -> None:
    expected = alone(root, model, "torch")
    script = script_of(root, model, kernels)
    found, *others = ranks.run(play, script, fully_sharded=fully_sharded)
    assert found.outputs == expected.outputs
    assert len({tuple(output) for output in expected.outputs}) == len(expected.outputs), "or nothing differs"
    assert len(found.logits) == len(expected.logits)
    for ours, theirs in zip(found.logits, expected.logits, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-4)
    assert all(other.logits == [] and other.outputs == found.outputs for other in others)
    assert {outcome.compiled for outcome in (found, *others)} == {compiled}


HALF, FULLY = False, True
PLAIN = [("llama", HALF), ("mistral", FULLY), ("qwen3", HALF), ("qwen3", FULLY), ("one-kv-head", FULLY)]
PLAIN += [("granite", HALF), ("phi3", FULLY)]
"""Models and modes of sharding."""


@pytest.mark.parametrize(("model", "fully_sharded"), mostly_slow_rows(PLAIN, ("qwen3", FULLY)))
@pytest.mark.slow
def test_two_ranks_give_the_tokens_and_logits_of_one(
    two: Ranks, root: Path, model: str, fully_sharded: bool
) -> None:
    check(two, root, model, fully_sharded)


@pytest.mark.parametrize(("model", "fully_sharded"), [("by-three", HALF), ("phi3-by-three", FULLY)])
@pytest.mark.slow
def test_three_ranks_give_the_tokens_and_logits_of_one(
    three: Ranks, root: Path, model: str, fully_sharded: bool
) -> None:
    """Neither the vocabulary nor most of the ranks divide."""
    check(three, root, model, fully_sharded)


COMPILED = [("qwen2", FULLY), ("qwen3", HALF), ("qwen3", FULLY), ("one-kv-head", HALF), ("gemma2", FULLY)]
COMPILED += [("gemma3", HALF), ("phi3", FULLY), ("glm4", HALF)]


@pytest.mark.parametrize(("model", "fully_sharded"), mostly_slow_rows(COMPILED, ("qwen3", FULLY)))
@pytest.mark.usefixtures("cpu_library")
@pytest.mark.slow
def test_so_they_do_in_compiled_steps(two: Ranks, root: Path, model: str, fully_sharded: bool) -> None:
    """The library comes back for what the ranks exchange in the middle of a step."""
    check(two, root, model, fully_sharded, "cpu", compiled=True)


@pytest.mark.parametrize("kernels", ["torch", "cpu"])
@pytest.mark.usefixtures("cpu_library")
@pytest.mark.slow
def test_int8_adapters_on_two_ranks(two: Ranks, root: Path, kernels: str) -> None:
    """Each rank's share has scales of its own, so logits are close to those of whole adapters, not equal."""
    expected = alone(root, "qwen2", "torch")
    script = script_of(root, "qwen2", kernels)._replace(int8_adapters=True)
    found, _ = two.run(play, script)
    # From the first step on, as long as the tokens are the same.
    assert len(found.logits) == len(expected.logits)
    ours, theirs = found.logits[0], expected.logits[0]
    error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
    assert 0 < error < 0.02


@pytest.mark.parametrize(
    ("model", "quantization", "fully_sharded"),
    mostly_slow_rows(
        [("qwen2", "int8", FULLY), ("gemma3", "int8", HALF), ("llama", "int4", FULLY)],
        ("qwen2", "int8", FULLY),
    ),
)
@pytest.mark.usefixtures("cpu_library")
def test_quantized_weights_on_two_ranks(
    two: Ranks, root: Path, model: str, quantization: Quantization, fully_sharded: bool
) -> None:
    """Each rank quantizes its share: logits are as near to those of whole weights as one rank's are."""
    loads = {slot: adapter_of(root, model, name) for slot, name in enumerate(("rank-4", "rank-16", "rank-5"))}
    phase = Phase(loads, [(prompt(9 + slot, 8), slot) for slot in (-1, *loads)])
    plain = Script(model_of(root, model), [phase], max_loras=3)
    script = plain._replace(kernels="cpu", quantization=quantization)
    exact = play(SoloGroup(), plain).logits[0]
    found, other = two.run(play, script, fully_sharded=fully_sharded)
    assert found.compiled and other.compiled
    shared, whole = (np.linalg.norm(o.logits[0] - exact) for o in (found, play(SoloGroup(), script)))
    assert 0 < shared < 1.2 * whole


@pytest.mark.usefixtures("cpu_library")
@pytest.mark.slow
def test_shares_that_compiled_steps_do_not_cover(three: Ranks, root: Path) -> None:
    """A third of the vocabulary is not in whole vectors: the library's operations, one by one."""
    check(three, root, "by-three", FULLY, "cpu")


@pytest.mark.usefixtures("cpu_library")
def test_a_compiled_step_ends_where_an_exchange_fails(two: Ranks, root: Path) -> None:
    script = script_of(root, "llama", "cpu")
    assert two.run(fail_in_exchange, script) == ["a rank is gone after 3 calls"] * 2


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL needs a CUDA device for each rank")
@pytest.mark.parametrize("fully_sharded", [False, True])
def test_so_they_do_on_gpus_over_nccl(root: Path, fully_sharded: bool) -> None:
    expected = alone(root, "llama", "torch")
    ranks = Ranks(2, "nccl")
    try:
        script = script_of(root, "llama", "torch")._replace(device="cuda", kernels=None)
        found, _ = ranks.run(play, script, fully_sharded=fully_sharded)
    finally:
        ranks.close()
    assert found.outputs == expected.outputs
    for ours, theirs in zip(found.logits, expected.logits, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=2e-3)


def test_saved_base_embeddings_are_compared_by_the_rank_that_has_them(
    two: Ranks, root: Path, tmp_path: Path
) -> None:
    """PEFT saves those of a head that an adapter is on."""
    folder = build_adapter(model_of(root, "qwen3"), tmp_path / "head", target_modules=["lm_head"])
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    base = load_file(model_of(root, "qwen3") / "model.safetensors")["lm_head.weight"]
    script = Script(model_of(root, "qwen3"), [], max_loras=1)
    save_file({**tensors, "base_model.model.lm_head.base_layer.weight": base}, file)
    assert two.run(refusal, script, folder) == ["", ""]
    base[-1, -1] += 1
    save_file({**tensors, "base_model.model.lm_head.base_layer.weight": base}, file)
    refusals = two.run(refusal, script, folder)
    assert refusals == ["", refusal(SoloGroup(), script, folder)]
    assert "differ from the base model's" in refusals[1]


def test_bytes_sent_are_those_of_the_formulas(two: Ranks, root: Path) -> None:
    """docs/models.md gives them: the base model's, and what fully sharded adapters add to them."""
    spec = read_spec(model_of(root, "qwen3"))
    adapters = functools.partial(adapter_of, root, "qwen3")
    prompts = [(prompt(1, 10), -1), (prompt(2, 6), 0), (prompt(3, 5), 1)]
    for loads, rank in (({}, 0), ({0: adapters("rank-4"), 1: adapters("rank-16")}, 16)):
        phase = Phase(loads, prompts if loads else [(tokens, -1) for tokens, _ in prompts])
        script = Script(
            model_of(root, "qwen3"), [phase], max_loras=2, max_rank=64, target_modules=LORA_MODULES
        )
        tokens, adapted, rows = 21, 11, 3
        # An all-reduce of n elements sends n on each of two ranks, a gather its own part.
        reduced = tokens * spec.hidden_size * (1 + 2 * spec.num_layers)
        logits = rows * spec.vocab_size // 2
        for fully_sharded in (False, True):
            extra = adapted * spec.num_layers * (5 * rank // 2 + 2 * rank) if fully_sharded else 0
            calls = spec.num_layers * 2 if fully_sharded and rank else 0
            sent = 4 * (reduced + logits + extra)
            expected = (1 + 2 * spec.num_layers + calls, 1 + calls, sent, tokens)
            assert two.run(traffic, script, fully_sharded=fully_sharded) == [expected, expected]


@pytest.mark.parametrize(
    ("model", "quantization", "fully_sharded"),
    [
        *(("qwen3", "none", HALF), ("mistral", "none", FULLY), ("one-kv-head", "none", FULLY)),
        *(("glm4", "none", HALF), ("qwen2", "int8", FULLY)),
    ],
)
@pytest.mark.usefixtures("cpu_library")
def test_the_plan_is_what_each_rank_allocates(
    two: Ranks, root: Path, model: str, quantization: Quantization, fully_sharded: bool
) -> None:
    modules = targetable(read_spec(model_of(root, model)))
    lora = LoRAConfig(
        max_loras=3, max_lora_rank=16, target_modules=modules, fully_sharded_loras=fully_sharded
    )
    config = EngineConfig(
        model=str(model_of(root, model)), executor="process", tensor_parallel_size=2, lora=lora,
        dtype="float32", device="cpu", max_model_len=64, kv_cache_memory="1MiB", quantization=quantization,
    )  # fmt: skip
    plan = plan_parts(config, available_bytes=10**9).memory
    assert plan.available_bytes == 10**9 // 2
    assert any("each of 2 ranks" in detail for _, detail, _ in plan.rows())
    script = Script(model_of(root, model), [], max_loras=3, max_rank=16, target_modules=modules)
    if quantization != "none":
        script = script._replace(kernels="cpu", quantization=quantization)
    adapter = adapter_of(root, model, "rank-16")
    for share in two.run(hold, script, adapter, fully_sharded=fully_sharded):
        assert share.weight_bytes == plan.bytes_of("base weights")
        assert share.slot_bytes == plan.bytes_of("slot pool")
        assert share.kv_bytes == plan.block_bytes * 128
        assert share.image_bytes <= plan.slot_bytes


def test_a_gguf_model_is_split_the_same_way(two: Ranks, tmp_path: Path) -> None:
    """Its q and k rows are reordered by whole heads, before they are cut; DoRA reads whole tensors of it."""
    torch_model = tiny_model("llama")
    torch_model.save_pretrained(tmp_path / "model")
    write_gguf(tmp_path / "model.gguf", torch_model, "llama", "Q8_0")
    adapter = build_adapter(tmp_path / "model", tmp_path / "dora", use_dora=True)
    tokens = random.Random(1).choices(range(3, 96), k=12)
    script = Script(tmp_path / "model.gguf", [Phase({0: adapter}, [(tokens, -1), (tokens, 0)])], max_loras=1)
    assert two.run(play, script)[0].outputs == play(SoloGroup(), script).outputs


GPTQ = gptq(ordered=True), {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}
FLOAT8 = float8((24, 16)), {"quant_method": "fp8", "weight_block_size": [24, 16]}
QUANTIZED: dict[str, tuple[tuple[Quantize, dict[str, Any]], str]] = {
    "act-order": (GPTQ, "llama"),
    "float8-blocks": (FLOAT8, "llama"),
    "act-order in one matrix": (GPTQ, "phi3"),
    "float8-blocks in one matrix": (FLOAT8, "phi3"),
}


@pytest.mark.parametrize("case", mostly_slow(QUANTIZED, "act-order"))
def test_a_quantized_model_is_split_the_same_way(two: Ranks, tmp_path: Path, case: str) -> None:
    """Weights stay as stored where a rank's inputs are whole groups; they are expanded where it has parts."""
    (quantize, config), family = QUANTIZED[case]
    pair = write_quantized(tmp_path, quantize, config, family=family)
    modules = read_spec(pair.packed).layer_modules
    adapter = build_adapter(pair.expanded, tmp_path / "dora", use_dora=True, target_modules=list(modules))
    tokens = random.Random(1).choices(range(3, 96), k=12)
    phase = Phase({0: adapter}, [(tokens, -1), (tokens, 0)])
    script = Script(pair.packed, [phase], max_loras=1, target_modules=modules)
    assert two.run(play, script)[0].outputs == play(SoloGroup(), script).outputs
    kept = set(Partition(read_spec(pair.packed), Shard(1, 2)).local.packed)
    assert ("model.layers.0.self_attn.o_proj" in kept) == ("float8" in case)
    assert f"model.layers.0.self_attn.{modules[0]}" in kept


@pytest.mark.parametrize("name", ["qwen3", "phi3"])
def test_fp8_ranks_have_parts_of_the_same_weights(two: Ranks, root: Path, name: str) -> None:
    """In the compiled step: each scale is of a whole row, whatever a rank has of it."""
    model = model_of(root, name)
    modules = read_spec(model).layer_modules
    adapter = build_adapter(model, root / f"{name}-fp8", use_dora=True, target_modules=list(modules))
    phase = Phase({0: adapter}, [(prompt(1, 12), -1), (prompt(2, 9), 0)])
    script = Script(model, [phase], max_loras=1, target_modules=modules, kernels="cpu", quantization="fp8")
    found, other = two.run(play, script)
    assert found.compiled and other.compiled
    assert found.outputs == play(SoloGroup(), script).outputs


def test_a_model_that_does_not_divide_is_refused_with_the_sizes_that_do(root: Path) -> None:
    spec = read_spec(model_of(root, "llama"))
    eight = msgspec.structs.replace(spec, num_heads=16, num_kv_heads=8, intermediate_size=2048)
    cases: list[tuple[ModelSpec, Shard, str]] = [
        (spec, Shard(0, 3), r"tensor_parallel_size=3: 4 attention heads.*sizes that work.*: 1, 2, 4$"),
        (msgspec.structs.replace(eight, num_kv_heads=6), Shard(0, 4), r"6 KV heads .*: 1, 2$"),
        (msgspec.structs.replace(eight, intermediate_size=100), Shard(0, 8), r"100 as the intermediate.*4$"),
        (msgspec.structs.replace(eight, hidden_size=36), Shard(0, 8, True), r"size, and 36.*: 1, 2, 4$"),
        (msgspec.structs.replace(eight, vocab_size=9), Shard(0, 8), r"vocabulary of 9 leaves.*: 1, 2$"),
    ]  # fmt: skip
    for model, shard, message in cases:
        with pytest.raises(ConfigError, match=message):
            Partition(model, shard)
    Partition(eight, Shard(15, 16))  # two ranks for each KV head


@pytest.mark.parametrize(
    "model", ["qwen3", "one-kv-head", "by-three", "mistral", "phi3", "glm4", "phi3-by-three"]
)
@pytest.mark.parametrize("fully_sharded", [False, True])
def test_shares_cover_every_matrix_once(root: Path, model: str, fully_sharded: bool) -> None:
    """What all ranks hold, put together, is the model, and each adapter's A and B: heads that are repeated
    and the matrices that are not split, more than once."""
    spec = read_spec(model_of(root, model))
    size, modules = 3 if "by-three" in model else 2, targetable(spec)
    layouts = [SlotLayout(spec, 16, modules, Shard(r, size, fully_sharded)) for r in range(size)]
    for module in modules:
        weight, a, b = times_held(layouts, module)
        repeated = size if model == "one-kv-head" and module in ("k_proj", "v_proj") else 1
        splits_inputs = module in ("o_proj", "down_proj", "embed_tokens")
        assert (weight == repeated).all()
        assert (a == (1 if splits_inputs or fully_sharded else size)).all()
        assert (b == (repeated if fully_sharded or not splits_inputs else size)).all()
