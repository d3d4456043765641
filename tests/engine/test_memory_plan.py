"""The plan is what is allocated, to the byte."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.engine_fixtures import MakeEngine, Tiny, greedy, prompt_of

from aioengine import AsyncEngine, EngineConfig, LoRAConfig
from aioengine.errors import ConfigError
from aioengine.executors.parts import build_parts, plan_parts
from aioengine.executors.warm_up import first_requests, kernel_shapes, largest_step
from aioengine.memory_plan import plan_memory, rooms_in_groups
from aioengine.model.cuda.working_memory import DETAILS, WORKSPACE_BYTES, working_memory
from aioengine.model.files.resolve import read_spec
from aioengine.model.spec import ModelSpec, RopeSpec


@pytest.mark.parametrize(
    "lora",
    [
        {"max_loras": 1, "max_lora_rank": 1},
        {"max_loras": 3, "max_lora_rank": 320},
        {"max_loras": 5, "max_lora_rank": 8, "target_modules": ["k_proj", "down_proj"]},
        {"max_loras": 2, "max_lora_rank": 16, "lora_dtype": "bfloat16"},
        {"max_loras": 2, "max_lora_rank": 4, "target_modules": ["v_proj", "embed_tokens", "lm_head"]},
        {"max_loras": 2, "max_lora_rank": 1, "lora_dtype": "int8"},
        {"max_loras": 2, "max_lora_rank": 4, "max_trained_tokens": 7},
        {"max_loras": 3, "max_lora_rank": 2, "max_trained_tokens": 5, "lora_dtype": "int8"},
        {"max_loras": 3, "max_lora_rank": 16, "lora_dtype": "int8", "target_modules": ["o_proj", "lm_head"]},
    ],
)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.slow
def test_the_plan_is_what_is_allocated(
    family: str, lora: dict[str, Any], tiny_of: Callable[[str], Tiny]
) -> None:
    model = str(tiny_of(family).model)
    config = EngineConfig(
        model=model, dtype="float32", max_model_len=64, kv_cache_memory="1MiB", lora=LoRAConfig(**lora)
    )
    planned = plan_parts(config)
    parts = build_parts(config, planned)
    plan, slots = planned.memory, parts.runner.lora_slots
    assert slots is not None
    assert plan == plan_parts(config, available_bytes=plan.available_bytes).memory

    tables = (slots.memory.table, slots.memory.device_table)
    tensors = [t for t in _tensors(slots) if not any(t is table for table in tables)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    assert sum(storages.values()) == plan.bytes_of("slot pool") == slots.nbytes
    assert parts.runner.model.nbytes == plan.bytes_of("base weights")
    assert parts.runner.kv_cache.nbytes == plan.bytes_of("KV blocks") <= 2**20

    tokens = config.lora.max_trained_tokens * planned.spec.hidden_size  # type: ignore[union-attr]
    assert plan.bytes_of("slot pool: trained tokens") == tokens * 4 * plan.num_slots
    if plan.lora_dtype == "int8":
        return  # sizes: tests/model/test_int8_adapters.py
    spec = planned.spec
    size = 2 if plan.lora_dtype == "bfloat16" else 4
    affine = 0
    assert sum(part.nbytes for part in plan.parts if not part.counts) == plan.bytes_of("slot pool")
    for module in spec.targets(lora.get("target_modules")):
        n_in, n_out = spec.linear(module)
        layers = 1 if module in ("embed_tokens", "lm_head") else spec.num_layers
        each = layers * config.lora.max_lora_rank * (n_in + n_out) * size  # type: ignore[union-attr]
        assert plan.bytes_of(f"slot pool: {module}") == each * plan.num_slots
        affine += layers * 2 * n_out * size
    assert plan.bytes_of("slot pool: DoRA and biases") == affine * plan.num_slots


def _tensors(holder: object, depth: int = 5) -> list[torch.Tensor]:
    """Every tensor that an object holds, found by looking and not by its own account."""
    if isinstance(holder, torch.Tensor):
        return [holder]
    if depth == 0 or isinstance(holder, (str, bytes, int, float, torch.dtype, torch.device)):
        return []
    if isinstance(holder, dict):
        children = list(holder.values())
    elif isinstance(holder, (list, tuple, set)):
        children = list(holder)
    else:
        children = list(getattr(holder, "__dict__", {}).values())
        children += [getattr(holder, name, None) for name in getattr(holder, "__slots__", ())]
    return [tensor for child in children for tensor in _tensors(child, depth - 1)]


def plan(tiny: Tiny, available: int, lora: LoRAConfig | None = None, **fields: Any) -> Any:
    config = EngineConfig(model=str(tiny.model), dtype="float32", lora=lora, **fields)
    return plan_memory(read_spec(tiny.model), config, device="cpu", available_bytes=available)


def test_what_does_not_fit_is_refused_by_how_much_and_with_the_knobs(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match=r"too little.*lower max_model_len"):
        plan(tiny, 600_000, max_model_len=512)
    big = LoRAConfig(max_loras=100, max_lora_rank=512)
    with pytest.raises(ConfigError, match=r"max_loras \(each slot.*max_lora_rank.*max_cpu_loras"):
        plan(tiny, 10**8, big)
    with pytest.raises(ConfigError, match="lower kv_cache_memory"):
        plan(tiny, 10**7, kv_cache_memory="1GiB")
    with pytest.raises(ConfigError, match=r"kv_cache_memory=1000 B.*raise kv_cache_memory"):
        plan(tiny, 10**9, kv_cache_memory=1000)
    with pytest.raises(ConfigError, match=r"max_model_len=513.*512"):
        plan(tiny, 10**9, max_model_len=513)


def test_kv_blocks_sized_from_what_is_free(tiny: Tiny) -> None:
    small, large = plan(tiny, 10**7), plan(tiny, 10**9)
    assert small.num_blocks < large.num_blocks
    assert small.total_bytes <= 10**7
    assert large.num_blocks * large.block_size >= 64 * 512, "enough for max_num_seqs at full length"


def test_a_small_model_on_a_cpu_takes_little(tiny_of: Callable[[str], Tiny]) -> None:
    """Room for every running request at a usual length, and always for one at full length."""
    spec = msgspec.structs.replace(read_spec(tiny_of("llama").model), max_position=8192)

    def tokens(device: str, **fields: Any) -> int:
        config = EngineConfig(model="m", dtype="float32", lora=None, **fields)
        found = plan_memory(spec, config, device=device, available_bytes=2**40)
        return found.num_blocks * found.block_size

    assert tokens("cpu", max_num_seqs=64) == 64 * 512
    assert tokens("cpu", max_num_seqs=64, block_size=24) == 64 * 528
    assert tokens("cpu", max_num_seqs=2) == 8192
    assert tokens("cpu", max_num_seqs=64, max_model_len=100) == 64 * 112
    assert tokens("cuda", max_num_seqs=64) == 64 * 8192


async def test_slots_by_bytes_take_what_is_planned(tiny: Tiny, make_engine: MakeEngine) -> None:
    """Many adapters of small ranks, where four of the largest would not fit; and metrics that say so."""
    fields = {"slot_memory": "256KiB", "max_loras": 8, "max_cpu_loras": 8}
    async with make_engine(tiny, **fields) as engine:
        plan = engine.plan
        assert plan.bytes_of("slot pool") == 2**18 and plan.bytes_of("CPU adapter cache") == 2**18
        await asyncio.gather(
            *(engine.load_adapter(name, tiny.adapters[name]) for name in ("rank-3", "qv-only", "regex"))
        )
        for name in ("rank-3", "qv-only", "regex"):
            await engine.complete(prompt_of(0, 5), greedy(2), adapter=name)
        stats = engine.stats()
        held = [slot for slot in stats.slots if slot.adapter is not None]
        assert len(held) == 3 and sum(slot.bytes for slot in held) == stats.slot_memory_used
        assert stats.slot_memory == 2**18
        text = engine.metrics.expose()[0].decode()
        by_name = {info.name: info.bytes for info in engine.adapters()}
        assert f'level="slot"}} {by_name["rank-3"]}' in text
        assert f'aioengine_lora_slot_bytes{{engine="default",state="used"}} {stats.slot_memory_used}' in text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"slot_memory": "sharde"}, "slot_memory='sharde'"),
        ({"slot_memory": "shared"}, "no longer share one memory. Set slot_memory to a number of bytes"),
        ({"slot_memory": 0}, "slot_memory=0: must be more than zero"),
        ({"slot_memory": "1MiB", "max_cpu_lora_bytes": 1000}, "max_cpu_lora_bytes=1000.*at least 1048576"),
        ({"slot_memory": "900TiB"}, "lower lora.slot_memory"),
    ],
)
def test_slot_memory_that_cannot_be(tiny: Tiny, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_parts(EngineConfig(model=str(tiny.model), lora=LoRAConfig(**fields)))


LLAMA3 = ModelSpec(
    family="llama",
    vocab_size=128256,
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=14336,
    rms_norm_eps=1e-5,
    max_position=131072,
    rope=RopeSpec(),
    tie_embeddings=False,
)


def working(config: EngineConfig) -> dict[str, int]:
    """What the steps of Llama 3 8B take of a GPU's memory."""
    return dict(working_memory(LLAMA3, LLAMA3, config, dtype_bytes=2, max_model_len=8192))


def test_on_a_gpu_graphs_streams_and_ranks_are_counted() -> None:
    lora = LoRAConfig(max_loras=4)
    base = working(EngineConfig(model="none", cuda_graphs=False, lora=None))
    assert base["workspaces"] == WORKSPACE_BYTES and base["graphs"] == base["exchange"] == 0
    recorded = working(EngineConfig(model="none", lora=lora))
    assert recorded["workspaces"] == 3 * WORKSPACE_BYTES  # the steps', the recordings', and DoRA's
    plain = working(EngineConfig(model="none", lora=None))
    assert recorded["graphs"] > plain["graphs"] > 2 * 64 * LLAMA3.vocab_size * 2
    two = EngineConfig(model="none", lora=None, executor="process", tensor_parallel_size=2)
    assert working(two)["exchange"] > 100 * 2**20
    assert working(two)["graphs"] > plain["graphs"], "exchanges are launches, too"


@given(
    available=st.integers(2**34, 2**37),
    seqs=st.sampled_from([1, 64, 512]),
    tokens=st.sampled_from([512, 2048, 16384]),
)
def test_on_a_gpu_the_kv_cache_leaves_the_steps_their_room(available: int, seqs: int, tokens: int) -> None:
    lora = LoRAConfig(max_loras=4)
    config = EngineConfig(model="none", max_num_seqs=seqs, max_num_batched_tokens=tokens, lora=lora)
    try:
        plan = plan_memory(LLAMA3, config, device="cuda", available_bytes=available)
    except ConfigError:
        with pytest.raises(ConfigError, match=r"activations .*, KV blocks .*; lower "):
            plan_memory(LLAMA3, config, device="cuda", available_bytes=available)
        return
    steps = tuple(DETAILS)
    assert plan.total_bytes == plan.bytes_of("base weights", "slot pool", "KV blocks", *steps) <= available
    assert plan.bytes_of(*steps) == sum(working(config).values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("slot_memory", [None, "1MiB"])
def test_the_first_steps_stay_within_the_plan(tiny: Tiny, slot_memory: str | None) -> None:
    config = EngineConfig(
        model=str(tiny.model), device="cuda", dtype="float32", kv_cache_memory="64MiB",
        lora=LoRAConfig(max_loras=2, slot_memory=slot_memory),
    )  # fmt: skip
    planned = plan_parts(config)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    runner = build_parts(config, planned).runner
    plan = planned.memory
    for batch in (*first_requests(plan), *kernel_shapes(plan, config), largest_step(plan, config)):
        runner.execute(batch)
    assert torch.cuda.max_memory_allocated() - before <= plan.total_bytes


class Group(NamedTuple):
    """A control group: bytes; ``limit`` None is none."""

    limit: int | None
    used: int
    reclaimable: int


sizes = st.integers(0, 2**40)
groups = st.lists(st.builds(Group, st.none() | sizes, sizes, sizes), max_size=4)


@given(groups=groups, inside=st.booleans())
@pytest.mark.slow
def test_limits_of_control_groups_are_seen(groups: list[Group], inside: bool) -> None:
    """In any group above the process; in a container (``inside``) only the top is there."""
    shown = groups[:1] if inside else groups
    with tempfile.TemporaryDirectory() as made:
        root = Path(made)
        path = "/".join(f"group{depth}" for depth in range(1, max(1, len(groups))))
        (root / "proc/self").mkdir(parents=True)
        (root / "proc/self/cgroup").write_text(f"7:cpu:/elsewhere\n0::/{path}\n")
        folder = root / "sys/fs/cgroup"
        for depth, group in enumerate(shown):
            folder = folder / f"group{depth}" if depth else folder
            folder.mkdir(parents=True)
            (folder / "memory.max").write_text(f"{'max' if group.limit is None else group.limit}\n")
            (folder / "memory.current").write_text(f"{group.used}\n")
            text = f"inactive_anon 5\ninactive_file {group.reclaimable}\nactive_file 7\n"
            (folder / "memory.stat").write_text(text)
        found = list(rooms_in_groups(root))
    left = [max(0, g.limit - g.used + g.reclaimable) for g in shown if g.limit is not None]
    assert sorted(found) == sorted(left)


def test_a_system_without_control_groups_has_no_limits(tmp_path: Path) -> None:
    assert list(rooms_in_groups(tmp_path)) == []


async def test_a_model_is_looked_up_once(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the Hub a second look might find another revision than the tokenizer's."""
    monkeypatch.setattr("aioengine.runtime.assemble.resolve_model", lambda name, progress: tiny.model)
    config = EngineConfig(model="org/name", dtype="float32", device="cpu", kv_cache_memory="4MiB")
    async with AsyncEngine(config) as engine:
        assert engine.model_path == tiny.model and engine.model_name == "org/name"
