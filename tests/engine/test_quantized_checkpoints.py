"""Quantized checkpoints: token for token what transformers and peft make of the expanded weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.engine_fixtures import MakeEngine, Tiny, check_tokens, greedy, prompt_of, register
from support.quantized_checkpoints import (
    Pair,
    Quantize,
    awq,
    compressed,
    float8,
    gptq,
    int_quantized,
    pack_quantized,
    write_quantized,
)
from support.selection import mostly_slow
from support.tiny_gguf import tiny_model, write_gguf
from support.tiny_models import build_adapter

from aioengine import EngineConfig
from aioengine.executors.parts import build_parts, plan_parts

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
GROUP = {"num_bits": 4, "strategy": "group", "group_size": 32}
FLOAT8 = {"num_bits": 8, "type": "float"}
ACTIVATIONS = {"num_bits": 8, "type": "int", "dynamic": True, "strategy": "token"}
SCHEMES: dict[str, tuple[Quantize, dict[str, Any]]] = {
    "gptq": (gptq(symmetric=True), {**GPTQ, "sym": True}),
    "gptq-asymmetric-act-order": (gptq(ordered=True), {**GPTQ, "desc_act": True}),
    "gptq-v2-whole-rows": (
        gptq(group=-1, less=0),
        {**GPTQ, "group_size": -1, "checkpoint_format": "gptq_v2"},
    ),
    "gptq-8-bits": (gptq(8), {**GPTQ, "bits": 8}),
    "awq": (
        awq(),
        {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
    ),
    "w4a16": (pack_quantized(), compressed("pack-quantized", GROUP)),
    "w4a16-asymmetric": (
        pack_quantized(symmetric=False),
        compressed("pack-quantized", {**GROUP, "symmetric": False}),
    ),
    "w8a16": (pack_quantized(8, -1), compressed("pack-quantized", {"num_bits": 8, "strategy": "channel"})),
    "w8a8": (
        int_quantized,
        compressed("int-quantized", {"num_bits": 8, "strategy": "channel"}, input_activations=ACTIVATIONS),
    ),
    "float8-by-output": (float8(), compressed("float-quantized", {**FLOAT8, "strategy": "channel"})),
    "float8-whole": (float8(whole=True), {"quant_method": "fp8", "activation_scheme": "static"}),
    "float8-blocks": (
        float8((24, 32), name="weight_scale_inv"),
        {"quant_method": "fp8", "weight_block_size": [24, 32], "activation_scheme": "dynamic"},
    ),
}
KINDS = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]


def mixed(name: str) -> str:
    """As Q4_K_M files are: some of q, k and v, and of the layers, have more bits."""
    if "attn_v" in name or "blk.1.ffn_down" in name or name.startswith("output"):
        return "Q6_K"
    return "Q8_0" if name.startswith("token_embd") else "F16" if "blk.1.attn_k" in name else "Q4_K"


def gguf_pair(root: Path, kind: str, **overrides: Any) -> Pair:
    sizes = {}
    if kind == "mixed" or kind.endswith("_K"):
        sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    model = tiny_model("llama", **{**sizes, "vocab_size": 256, **overrides})
    path = write_gguf(root / "model.gguf", model, "llama", mixed if kind == "mixed" else kind)
    model.save_pretrained(root / "expanded")
    return Pair(path, root / "expanded")


def pair_of(kind: str, root: Path) -> Pair:
    if kind in SCHEMES:
        quantize, config = SCHEMES[kind]
        return write_quantized(root, quantize, config)
    return gguf_pair(root, kind.removesuffix("-tied"), tie_word_embeddings=kind.endswith("-tied"))


CHECKPOINTS = [*SCHEMES, *KINDS, "mixed", "Q8_0-tied", "Q6_K-tied"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """``pairs(kind)``: made once."""
    return functools.cache(lambda kind: pair_of(kind, tmp_path_factory.mktemp(kind)))


@pytest.mark.parametrize(
    "kind", mostly_slow(CHECKPOINTS, "gptq-asymmetric-act-order", "float8-blocks", "Q6_K-tied")
)
@pytest.mark.slow
async def test_tokens_are_those_of_the_expanded_weights(
    kind: str, pairs: Callable[[str], Pair], tmp_path: Path, make_engine: MakeEngine
) -> None:
    """In the compiled step, without a setting."""
    await check(pairs(kind), {"lora": {"r": 8}}, tmp_path, make_engine, block_size=16)


@pytest.mark.parametrize(
    "kind", mostly_slow(["gptq-asymmetric-act-order", "float8-blocks", "mixed", "Q6_K-tied"], "mixed")
)
@pytest.mark.slow
async def test_so_they_are_where_the_compiled_step_is_not_and_with_dora(
    kind: str, pairs: Callable[[str], Pair], tmp_path: Path, make_engine: MakeEngine
) -> None:
    adapters = {"lora": {"r": 8}, "dora": {"r": 4, "use_dora": True}}
    await check(pairs(kind), adapters, tmp_path, make_engine, block_size=4)
    await check(pairs(kind), {"dora-2": {"r": 5, "use_dora": True}}, tmp_path, make_engine, block_size=16)


async def check(
    pair: Pair, configs: dict[str, dict[str, Any]], root: Path, make_engine: MakeEngine, *, block_size: int
) -> None:
    adapters = {name: build_adapter(pair.expanded, root / name, **config) for name, config in configs.items()}
    tiny, reference = Tiny(pair.packed, adapters), Tiny(pair.expanded, adapters)
    asked = [(prompt_of(i, 5 + 9 * i), name) for i, name in enumerate([None, *adapters, None])]
    async with make_engine(tiny, block_size=block_size) as engine:
        register(engine, tiny)
        await check_tokens(engine, reference, asked, 8)


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_weights_are_not_expanded_in_memory_and_the_plan_is_exact(
    kind: str, pairs: Callable[[str], Pair]
) -> None:
    config = EngineConfig(
        model=str(pairs(kind).packed), dtype="bfloat16", max_model_len=64, kv_cache_memory="1MiB"
    )
    planned = plan_parts(config)
    runner = build_parts(config, planned).runner
    assert runner.model.compiled, "the compiled step runs it"
    assert runner.model.nbytes == planned.memory.bytes_of("base weights")
    stored = sum(packing.nbytes(n, k) for (k, n), packing in planned.spec.packed_weights())
    elements = sum(n * k for (k, n), _ in planned.spec.packed_weights())
    rest = planned.spec.num_parameters() - elements
    assert planned.memory.bytes_of("base weights") == stored + 2 * rest
    assert stored < 1.35 * elements
    assert "as stored" in planned.memory.rows()[0][1]


@pytest.mark.parametrize("kind", ["awq", "mixed"])
async def test_they_can_be_quantized_anew(
    kind: str, pairs: Callable[[str], Pair], make_engine: MakeEngine
) -> None:
    """A setting asks for it: then the weights are those that the expanded model would have."""
    prompt = prompt_of(1, 30)
    found = []
    for path in pairs(kind):
        async with make_engine(Tiny(path, {}), block_size=16, quantization="int8") as engine:
            found.append((await engine.complete(prompt, greedy(12))).token_ids)
    assert found[0] == found[1]
