"""Builds a device's parts: the model, and the memory for its adapters. Blocks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from aioengine.config import EngineConfig
from aioengine.errors import ConfigError
from aioengine.info import LoadProgress
from aioengine.memory_plan import MemoryPlan, plan_memory, resolve_device
from aioengine.model.coverage import check_invariant
from aioengine.model.files.quantized import with_quantization
from aioengine.model.files.resolve import read_spec, resolve_model
from aioengine.model.parallel.group import SOLO, Group, Shard, SoloGroup
from aioengine.model.spec import ModelSpec

if TYPE_CHECKING:
    from aioengine.adapters.store import AdapterStore
    from aioengine.model.runner import ModelRunner


class PartsPlan(NamedTuple):
    """Plan of what to build from the model's folder or file."""

    path: Path
    spec: ModelSpec
    memory: MemoryPlan


class Parts(NamedTuple):
    """A model in this process, and the CPU cache for its adapters."""

    runner: ModelRunner
    store: AdapterStore


def _index_of_device(config: EngineConfig, shard: Shard) -> int:
    """Return the number of a rank's GPU among those that its process sees: Ray shows it its own alone."""
    return 0 if config.executor == "ray" else shard.rank


def plan_parts(
    config: EngineConfig,
    shard: Shard = SOLO,
    progress: LoadProgress | None = None,
    available_bytes: int | None = None,
) -> PartsPlan:
    """Plan what one rank's process allocates, for a device with so many free bytes; None: those it has.

    Raises ConfigError if the model is not available, is not supported, or this rank's share does not fit, or
    if there are fewer devices than ranks.
    """
    device = resolve_device(config.device)
    if device == "cuda" and shard.size > 1:
        import torch  # only an engine that starts needs it

        index = _index_of_device(config, shard)
        if index >= torch.cuda.device_count():
            raise ConfigError(
                f"tensor_parallel_size={shard.size}: there are {torch.cuda.device_count()} CUDA devices, and "
                "every rank needs one; lower tensor_parallel_size"
            )
        torch.cuda.set_device(index)
    path = resolve_model(config.model, progress)
    spec = read_spec(path, config.model_impl, config.quantization)
    spec = with_quantization(spec, config.quantization, device, config.tensor_parallel_size)
    return PartsPlan(path, spec, plan_memory(spec, config, device=device, available_bytes=available_bytes))


def build_parts(
    config: EngineConfig,
    planned: PartsPlan,
    group: Group | None = None,
    progress: LoadProgress | None = None,
) -> Parts:
    """Load the model, or the share of it that ``group`` gives to this rank, and allocate what is planned.

    Raises ConfigError if the weights cannot be read, or if ``config`` requires batch invariance and these
    kernels do not have it.
    """
    import torch

    from aioengine.adapters.store import AdapterStore
    from aioengine.model.buffer import Allocate, page_locked, pageable
    from aioengine.model.build import build_runner
    from aioengine.model.cuda.working_memory import mixed_sizes
    from aioengine.model.decode_graphs import DecodeLimits
    from aioengine.model.slots.layout import SlotLayout

    plan = planned.memory
    group = SoloGroup() if group is None else group
    device = plan.device
    graphs: DecodeLimits | None = None
    if device == "cuda":
        if group.shard.size > 1:
            device = f"cuda:{_index_of_device(config, group.shard)}"
        if config.cuda_graphs:
            sizes = mixed_sizes(config.max_num_batched_tokens)
            graphs = DecodeLimits(config.max_num_seqs, plan.max_model_len, sizes)
    lora = config.lora
    dtype, lora_dtype = getattr(torch, plan.dtype), getattr(torch, plan.lora_dtype)
    runner = build_runner(
        planned.spec,
        planned.path,
        dtype=dtype,
        device=device,
        num_blocks=plan.num_blocks,
        block_size=plan.block_size,
        max_loras=plan.num_slots,
        max_lora_rank=1 if lora is None else lora.max_lora_rank,
        max_trained_tokens=0 if lora is None else lora.max_trained_tokens,
        slot_memory=plan.slot_memory,
        lora_dtype=lora_dtype,
        target_modules=None if lora is None else planned.spec.targets(lora.target_modules),
        max_model_len=plan.max_model_len,
        quantization=config.quantization,
        kv_cache_dtype=config.kv_cache_dtype,
        progress=progress,
        group=group,
        fixed_decode=graphs,
    )
    check_invariant(config, runner.variance)
    allocate: Allocate = pageable
    stream: torch.cuda.Stream | None = None
    if plan.device == "cuda":
        allocate = page_locked(runner.model.device)
        stream = torch.cuda.Stream(runner.model.device)  # type: ignore[no-untyped-call] # torch has no types for it
    slots = runner.lora_slots
    store = AdapterStore(
        SlotLayout(planned.spec, 1, ()) if slots is None else slots.layout,
        dtype=lora_dtype,
        weights=runner.model.base_weight,
        allocate=allocate,
        stream=stream,
        affine_dtype=dtype,
    )
    return Parts(runner, store)
