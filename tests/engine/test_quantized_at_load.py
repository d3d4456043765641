"""Weights that are quantized while they are loaded: tokens are those of a model with the values in effect."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.engine_fixtures import MakeEngine, Tiny, check_tokens, prompt_of, register
from support.quantized_checkpoints import float8, write_quantized
from support.tiny_models import build_adapter, build_model

from aioengine import EngineConfig
from aioengine.kernels.blocks import BlockWeight
from aioengine.kernels.portable.quantize import quantize
from aioengine.memory_plan import plan_memory
from aioengine.model.files.quantized import packing_of, with_quantization
from aioengine.model.files.resolve import read_spec
from aioengine.model.parallel.group import Shard
from aioengine.model.parallel.partition import Partition
from aioengine.model.spec import Quantization

FORMS: tuple[Quantization, ...] = ("int8", "int4", "fp8")
LINEAR = re.compile(r".*proj\.weight|lm_head\.weight")


def write_rounded(model: Path, folder: Path, form: Quantization) -> Path:
    """Copy a model with the values that its linears have in effect."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    for name, weight in tensors.items():
        if LINEAR.fullmatch(name):
            k = weight.shape[1]
            packing = packing_of(form, k)
            assert packing is not None
            made = quantize(packing.format, weight.float(), packing.group or k)
            block = BlockWeight(packing.format, k=k, dtype=torch.float32, group=packing.group or k, **made)
            tensors[name] = block.rows(0, len(weight))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("block_size", [16, 4], ids=["compiled", "torch"])
@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.slow
async def test_fp8_in_the_compiled_step_and_without_it(
    family: str, block_size: int, tmp_path: Path, make_engine: MakeEngine
) -> None:
    """Adapters, also DoRA, are exact relative to the weights in effect."""
    model = build_model(tmp_path / "model", family)
    rounded = write_rounded(model, tmp_path / "rounded", "fp8")
    modules = list(read_spec(model).layer_modules)
    adapters = {
        name: build_adapter(rounded, tmp_path / name, r=8, target_modules=modules, use_dora=name == "dora")
        for name in ("lora", "dora")
    }
    reference = Tiny(rounded, adapters)
    asked = [(prompt_of(i, 5 + 9 * i), name) for i, name in enumerate([None, *adapters, None])]
    fields: dict[str, Any] = {"block_size": block_size, "quantization": "fp8", "target_modules": modules}
    async with make_engine(Tiny(model, adapters), **fields) as engine:
        register(engine, reference)
        await check_tokens(engine, reference, asked, 8)


async def test_a_float8_checkpoint_with_the_same_scales_is_kept(
    tmp_path: Path, make_engine: MakeEngine
) -> None:
    """And one with scales for blocks is quantized anew."""
    config = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    same = write_quantized(tmp_path / "same", float8(), config)
    config = {**config, "weight_block_size": [24, 32]}
    other = write_quantized(tmp_path / "other", float8((24, 32), name="weight_scale_inv"), config)
    for pair, kept in ((same, True), (other, False)):
        skipped = write_rounded(pair.expanded, pair.packed.parent / "rounded", "fp8")
        tensors = load_file(skipped / "model.safetensors")
        if kept:
            plain = load_file(pair.expanded / "model.safetensors")
            tensors = {name: plain[name] if name != "lm_head.weight" else tensors[name] for name in tensors}
        save_file(tensors, skipped / "model.safetensors", metadata={"format": "pt"})
        async with make_engine(Tiny(pair.packed, {}), block_size=16, quantization="fp8") as engine:
            await check_tokens(engine, Tiny(skipped, {}), [(prompt_of(1, 30), None)], 12)


@pytest.mark.parametrize("form", get_args(Quantization))
def test_a_plan_for_cuda_counts_them(form: Quantization, tmp_path: Path) -> None:
    model = build_model(tmp_path / "model", "llama", hidden_size=256, intermediate_size=512)
    config = EngineConfig(model=str(model), device="cuda", dtype="bfloat16", quantization=form)
    spec = read_spec(model)
    found = plan_memory(spec, config, device="cuda", available_bytes=2**33).bytes_of("base weights")
    elements = sum(n * k for k, n in (spec.stored_shape(module) for _, module in spec.quantized_modules()))
    bits = 8 * (found - 2 * (spec.num_parameters() - elements)) / elements
    expected = {"none": 16, "int8": 8 + 32 / 256, "fp8": 8 + 32 / 256, "int4": 4.75}[form]
    assert expected * 0.98 <= bits <= expected * 1.02


@pytest.mark.parametrize("form", FORMS)
def test_ranks_have_whole_groups(form: Quantization, tmp_path: Path) -> None:
    """So that each keeps its part of every weight in the form; 192 inputs are groups of 64, or of 32."""
    model = build_model(tmp_path / "model", "llama", hidden_size=128, intermediate_size=192)
    for ranks, group in ((1, 64), (2, 32)):
        spec = with_quantization(read_spec(model), form, "cuda", ranks)
        assert Partition(spec, Shard(1 % ranks, ranks)).local.packed == spec.packed
        down = spec.packed["model.layers.0.mlp.down_proj"]
        assert down.group == (group if form == "int4" else 0)
        assert spec.packed["model.layers.0.mlp.up_proj"].group == (64 if form == "int4" else 0)
