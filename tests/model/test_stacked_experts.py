"""GPT-OSS checkpoints, with experts in MXFP4 too: against transformers' own reading of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.moe_adapters import PARAMETERS, MoeModel
from support.served_models import check, engine_of, prompt
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from aioengine import EngineConfig, SamplingParams
from aioengine.errors import ConfigError
from aioengine.executors.parts import build_parts, plan_parts
from aioengine.kernels import available_backends
from aioengine.kernels.blocks import BlockWeight
from aioengine.model.experts.spec import MixtureSpec
from aioengine.model.files.packing import MXFP4
from aioengine.model.files.resolve import read_spec
from aioengine.model.parallel.group import Shard
from aioengine.model.parallel.partition import Partition
from aioengine.model.spec import Quantization

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
STACKED = ("gate_up_proj", "down_proj")


def random_mxfp4(n: int, groups: int, seed: int, experts: int = 1) -> tuple[Tensor, Tensor]:
    """Blocks and scales, of values up to about one."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (experts, n, groups, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(122, 126, (experts, n, groups), generator=generator, dtype=torch.uint8)
    return blocks, scales


def checkpoint(root: Path, edit: Callable[[dict[str, Tensor]], None] | None = None) -> MoeModel:
    """A model whose folder has the experts in MXFP4; the one in memory has their values."""
    model = MoeModel(root, "gpt_oss", intermediate_size=64, sliding_window=9)
    path = model.folder / "model.safetensors"
    tensors = load_file(path)
    for i, layer in enumerate(model.base.model.layers):
        for seed, name in enumerate(STACKED):
            parameter = getattr(layer.mlp.experts, name)
            experts, k, n = parameter.shape
            blocks, scales = random_mxfp4(n, k // 32, 2 * i + seed, experts)
            with torch.no_grad():
                parameter.copy_(convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
            key = f"model.layers.{i}.mlp.experts.{name}"
            del tensors[key]
            tensors |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
    if edit is not None:
        edit(tensors)
    save_file(tensors, path)
    config = json.loads((model.folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (model.folder / "config.json").write_text(json.dumps(config))
    return model


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 9), groups=st.integers(1, 4), data=st.data())
def test_values_are_those_of_transformers(n: int, groups: int, data: st.DataObject) -> None:
    exponents = st.lists(st.integers(1, 254), min_size=n * groups, max_size=n * groups)
    blocks, _ = random_mxfp4(n, groups, data.draw(st.integers(0, 1000)))
    scales = torch.tensor(data.draw(exponents), dtype=torch.uint8).view(1, n, groups)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)[0].T
    weight = BlockWeight("mxfp4", blocks[0].flatten(1), 32 * groups, torch.float32, scale=scales[0], group=32)
    assert torch.equal(weight.rows(0, n), expected)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.slow
async def test_tokens_are_those_of_the_expanded_model(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With adapters on the experts, too, which are relative to the weights that the codes stand for."""
    if backend not in available_backends("cpu"):
        pytest.skip("the CPU library cannot be built here")
    monkeypatch.setenv("AIOENGINE_KERNELS", backend)
    model = checkpoint(tmp_path)
    model.add_by_peft("parameters", 3, target_modules=["v_proj"], target_parameters=PARAMETERS)
    model.add_by_module("dora", 8, (0, 1, 2), dora=True)
    lora = {"max_loras": 2, "max_cpu_loras": 2, "max_lora_rank": 8}
    async with engine_of(model.folder, model_impl="auto", block_size=16, lora=lora) as engine:
        assert engine.info.model_impl == "native"
        assert engine.info.batch_invariant == (backend == "cpu"), "the compiled step runs it"
        await check(model, engine)


@pytest.mark.usefixtures("preloaded_workers")
@pytest.mark.slow
async def test_two_ranks_keep_their_parts_as_stored(tmp_path: Path) -> None:
    model = checkpoint(tmp_path)
    whole = read_spec(model.folder, "native")
    assert Partition(whole, Shard(1, 2)).local.packed == whole.packed
    params, tokens = SamplingParams(max_tokens=6, ignore_eos=True), prompt(0, 20)
    ranks: dict[str, Any] = {"executor": "process", "tensor_parallel_size": 2, "block_size": 16}
    async with engine_of(model.folder, model_impl="native", **ranks) as engine:
        output = await engine.complete(tokens, params)
    logits = model.logits([*tokens, *output.token_ids[:-1]], None)[len(tokens) - 1 :]
    assert output.token_ids == logits.argmax(-1).tolist()


def test_experts_stay_as_stored_and_the_plan_is_to_the_byte(tmp_path: Path) -> None:
    model = checkpoint(tmp_path)
    config = EngineConfig(
        model=str(model.folder), model_impl="native", max_model_len=64, device="cpu", dtype="float32",
        kv_cache_memory="1MiB",
    )  # fmt: skip
    planned = plan_parts(config)
    spec = planned.spec
    assert isinstance(spec, MixtureSpec) and set(spec.packed.values()) == {MXFP4}
    assert len(spec.packed) == 3 * spec.experts * spec.num_layers
    assert build_parts(config, planned).runner.model.nbytes == planned.memory.bytes_of("base weights")
    each = 17 / 32  # a byte for two codes, and one for 32
    experts = 3 * spec.experts * spec.num_layers * spec.hidden_size * spec.expert_size
    assert planned.memory.bytes_of("base weights") == 4 * (spec.num_parameters() - experts) + each * experts


@pytest.mark.parametrize("form", ["int8", "fp8"])
@pytest.mark.slow
async def test_a_checkpoint_may_be_quantized_anew(form: Quantization, tmp_path: Path) -> None:
    model = checkpoint(tmp_path)
    params, tokens = SamplingParams(max_tokens=1, logprobs=1), prompt(0, 20)
    async with engine_of(model.folder, model_impl="native", block_size=16, quantization=form) as engine:
        output = await engine.complete(tokens, params)
    assert output.logprobs is not None
    expected = model.logits(tokens, None)[-1].log_softmax(-1).max()
    assert abs(output.logprobs[0].logprob - float(expected)) < 0.2


FIRST = "model.layers.0.mlp.experts.gate_up_proj"


def _without_scales(tensors: dict[str, Tensor]) -> None:
    del tensors[f"{FIRST}_scales"]


def _cut(tensors: dict[str, Tensor]) -> None:
    tensors[f"{FIRST}_blocks"] = tensors[f"{FIRST}_blocks"][:, 2:].clone()


def _not_finite(tensors: dict[str, Tensor]) -> None:
    tensors[f"{FIRST}_scales"][1, 2, 0] = 255


def _other_type(tensors: dict[str, Tensor]) -> None:
    tensors[f"{FIRST}_scales"] = tensors[f"{FIRST}_scales"].float()


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (_without_scales, r"are missing: model\.layers\.0\.mlp\.experts\.0\.gate_proj\.weight"),
        (_cut, r"gate_up_proj_blocks: expected shape \(4, 128, 2, 16\).*found \(4, 126, 2, 16\)"),
        (_not_finite, r"experts\.1\.gate_proj\.weight: a scale is not finite"),
        (_other_type, "gate_up_proj_scales: expected U8, found F32"),
    ],
)
async def test_a_damaged_checkpoint_is_refused_by_name(
    edit: Callable[[dict[str, Tensor]], None], words: str, tmp_path: Path
) -> None:
    model = checkpoint(tmp_path, edit)
    with pytest.raises(ConfigError, match=words):
        async with engine_of(model.folder, model_impl="native"):
            pass
