"""What steps take of a GPU's memory is planned: nothing that a step makes is beyond the plan."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fake_cuda import FakeCuda
from support.fake_gpu import run_on_fake_gpu
from support.tiny_models import build_model

from aioengine import EngineConfig, LoRAConfig
from aioengine.adapters.peft.dora import rows_of
from aioengine.errors import ConfigError
from aioengine.executors.parts import PartsPlan, build_parts
from aioengine.executors.warm_up import first_requests, kernel_shapes, largest_step
from aioengine.kernels.blocks import BlockWeight
from aioengine.kernels.portable.quantize import quantize
from aioengine.kernels.weight import PlainWeight, Weight
from aioengine.memory_plan import available_memory, plan_memory
from aioengine.model.cuda.working_memory import DETAILS, WORKSPACE_BYTES, working_memory
from aioengine.model.files.hf_config import read_spec
from aioengine.model.linear import WeightRows
from aioengine.model.penalties import Penalties
from aioengine.model.sampler import sample
from aioengine.model.spec import ModelSpec
from aioengine.request import SamplingParams
from aioengine.step import SequenceWork

STEPS = tuple(DETAILS)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("model"), "llama", num_hidden_layers=1)


@pytest.mark.slow
def test_the_layers_take_what_is_planned() -> None:
    """Prompts, mixed steps and long contexts of several models; nothing is planned that is never taken."""
    found = run_on_fake_gpu("working_memory")
    assert len(found) > 15
    for what, planned, peak in found:
        assert peak <= planned, what
        # No adapter here has the rank that a mix may have.
        assert "mixed" in what or planned <= 1.4 * peak, what


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.7, 1.0]),
    top_k=st.sampled_from([0, 5, 100]),
    top_p=st.sampled_from([1.0, 0.9]),
    min_p=st.sampled_from([0.0, 0.01]),
    repetition_penalty=st.sampled_from([1.0, 1.1]),
    frequency_penalty=st.sampled_from([0.0, 0.2]),
    presence_penalty=st.sampled_from([0.0, 0.1]),
    logprobs=st.sampled_from([None, 0, 20]),
    logit_bias=st.sampled_from([{}, {3: 1.0}]),
)


@settings(max_examples=8, deadline=None)
@given(st.lists(PARAMS, min_size=1, max_size=3), st.sampled_from([torch.bfloat16, torch.float32]))
@pytest.mark.slow
def test_sampling_takes_what_is_planned(params: list[SamplingParams], dtype: torch.dtype) -> None:
    rows, vocab = 12, 32768
    planned = _planned(_llama(vocab), EngineConfig(model="none", max_num_seqs=rows), dtype.itemsize)
    with FakeCuda() as world:
        penalties = Penalties()
        for step in range(2):
            logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(step)).to(dtype)
            history = [1, 2, 3, 4][: 3 + step]
            work = [
                SequenceWork(str(i), -1, [1], 3, [0], True, params[i % len(params)], i, history, 2)
                for i in range(rows)
            ]
            sample(logits.to("cuda"), work, penalties)
        assert world.live.peak <= planned["sampling"]
        assert world.live.now <= 2**16


def _planned(spec: ModelSpec, config: EngineConfig, dtype_bytes: int = 2):  # type: ignore[no-untyped-def]
    return working_memory(spec, spec, config, dtype_bytes=dtype_bytes, max_model_len=8192)


def _llama(vocab: int = 128256) -> ModelSpec:
    from gpu_without_gpu.scenarios import llama

    return llama(vocab_size=vocab, num_layers=32)  # type: ignore[return-value]


@settings(max_examples=4, deadline=None)
@given(
    format=st.sampled_from(["int4", "int8", "fp8"]),
    module=st.sampled_from(["q_proj", "down_proj"]),
    rank=st.sampled_from([8, 64]),
)
@pytest.mark.slow
def test_reading_an_adapter_takes_what_is_planned(format: str, module: str, rank: int) -> None:
    """Norms of DoRA over a quantized weight, of which a piece is expanded at a time."""
    spec = msgspec.structs.replace(_llama(), num_layers=2)
    lora = LoRAConfig(max_loras=4, max_lora_rank=rank, target_modules=[module])
    plain = _planned(spec, EngineConfig(model="none", lora=lora))["reads"]
    packed = {f"model.layers.{layer}.self_attn.q_proj": None for layer in range(2)}
    spec = msgspec.structs.replace(spec, packed=packed)
    planned = _planned(spec, EngineConfig(model="none", lora=lora))["reads"]
    assert _planned(spec, EngineConfig(model="none", lora=None))["reads"] == 0
    n, k = spec.linear(module).out_features, spec.linear(module).in_features
    made = quantize(format, torch.randn(256, k), 128)
    made = {name: tensor.repeat(n // 256, 1) for name, tensor in made.items()}
    a, b = torch.randn(rank, k), torch.randn(n, rank)
    for expands, limit in ((False, plain), (True, planned)):
        with FakeCuda() as world:
            on_device = {name: tensor.to("cuda") for name, tensor in made.items()}
            weight: Weight = BlockWeight(format, k=k, dtype=torch.bfloat16, group=128, **on_device)
            if not expands:
                weight = PlainWeight(torch.zeros(n, k, dtype=torch.bfloat16, device="cuda"))
            adapter: Any = SimpleNamespace(computed={(layer, module): (a, b) for layer in (0, 1)})
            world.live.peak = before = world.live.now
            bias = torch.zeros(n, device="cuda")
            rows = WeightRows(weight, 0, n), bias
            rows_of(adapter, lambda *_, rows=rows: rows, list(adapter.computed))  # type: ignore[misc]
            assert world.live.peak - before <= limit


def test_graphs_streams_and_ranks_are_counted() -> None:
    spec, lora = _llama(), LoRAConfig(max_loras=4)
    base = _planned(spec, EngineConfig(model="none", cuda_graphs=False, lora=None))
    assert base["workspaces"] == WORKSPACE_BYTES and base["graphs"] == base["exchange"] == 0
    recorded = _planned(spec, EngineConfig(model="none", lora=lora))
    assert recorded["workspaces"] == 3 * WORKSPACE_BYTES  # the steps', the recordings', and DoRA's
    plain = _planned(spec, EngineConfig(model="none", lora=None))
    assert recorded["graphs"] > plain["graphs"] > 2 * 64 * spec.vocab_size * 2
    two = EngineConfig(model="none", lora=None, executor="process", tensor_parallel_size=2)
    ranks = _planned(spec, two)
    assert ranks["exchange"] > 100 * 2**20
    assert ranks["graphs"] > plain["graphs"], "exchanges are launches, too"


@settings(max_examples=50, deadline=None)
@given(
    available=st.integers(2**34, 2**37),
    seqs=st.sampled_from([1, 64, 512]),
    tokens=st.sampled_from([512, 2048, 16384]),
)
def test_the_kv_cache_leaves_them_their_room(available: int, seqs: int, tokens: int) -> None:
    lora = LoRAConfig(max_loras=4)
    config = EngineConfig(model="none", max_num_seqs=seqs, max_num_batched_tokens=tokens, lora=lora)
    try:
        plan = plan_memory(_llama(), config, device="cuda", available_bytes=available)
    except ConfigError:
        with pytest.raises(ConfigError, match=r"activations .*, KV blocks .*; lower "):
            plan_memory(_llama(), config, device="cuda", available_bytes=available)
        return
    parts = plan.bytes_of("base weights", "slot pool", "KV blocks", *STEPS)
    assert plan.total_bytes == parts <= available
    assert plan.bytes_of(*STEPS) == sum(_planned(_llama(), config).values())


@pytest.mark.parametrize("slot_memory", [None, "1MiB"])
def test_the_first_steps_stay_within_the_plan(
    model: Path, slot_memory: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIOENGINE_KERNELS", "torch")
    spec = read_spec(model)
    config = EngineConfig(
        model=str(model), dtype="float32", kv_cache_memory="4MiB", max_model_len=200, max_num_seqs=16,
        max_num_batched_tokens=256, lora=LoRAConfig(max_loras=2, slot_memory=slot_memory),
    )  # fmt: skip
    with FakeCuda() as world:
        plan = plan_memory(spec, config, device="cuda")
        runner = build_parts(config, PartsPlan(model, spec, plan)).runner
        exact = plan.total_bytes - plan.bytes_of(*STEPS)
        assert exact <= world.live.now < exact + 2**20  # beside weights, slots and cache there is little
        for batch in (*first_requests(plan), *kernel_shapes(plan, config), largest_step(plan, config)):
            runner.execute(batch)
        taken = plan.available_bytes - available_memory("cuda")
        del runner
    assert exact < taken < plan.total_bytes
