"""Putting an engine's parts together: blocking, so it runs in a thread. Imports torch."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from aioengine.adapters.loader import AdapterLoader
from aioengine.adapters.resolvers.base import AdapterResolver
from aioengine.adapters.resolvers.filesystem import FilesystemResolver
from aioengine.config import EngineConfig, LoRAConfig
from aioengine.core import CoreLimits
from aioengine.errors import ConfigError, PolicyError
from aioengine.executors.base import Executor
from aioengine.executors.process.executor import ProcessExecutor
from aioengine.executors.process.worker_loader import WorkerLoader
from aioengine.executors.thread import ThreadExecutor
from aioengine.info import LoadProgress
from aioengine.memory_plan import MemoryPlan, plan_memory, resolve_device
from aioengine.model.files.resolve import read_spec, resolve_model
from aioengine.model.parallel.group import Group, Shard, SoloGroup
from aioengine.model.spec import ModelSpec
from aioengine.runtime.transfers import Loader
from aioengine.schedulers import SchedulerPolicy, load_policy
from aioengine.step import StepBatch

if TYPE_CHECKING:
    from aioengine.adapters.store import AdapterStore
    from aioengine.model.runner import ModelRunner
    from aioengine.model.text.tokenizer import Tokenizer

CPU_STEP_SECONDS = 0.2
"""``max_step_seconds`` on a CPU, unless it is given. There the shorter chunks cost next to nothing; a GPU
computes as many tokens as a step may have in less, and is idle between two steps."""


class Built(NamedTuple):
    """What an engine is put together from."""

    spec: ModelSpec
    plan: MemoryPlan
    tokenizer: Tokenizer | None
    executor: Executor
    loader: Loader
    resolver: AdapterResolver | None
    model_path: Path | None = None
    """The model's folder or file; None if there is no model."""
    timer: Callable[[], float] = time.perf_counter
    """What decisions, and the event loop's lag, are measured with."""
    first_steps: Sequence[tuple[StepBatch, float]] = ()
    """Steps that were taken while it started, and their seconds."""


class Parts(NamedTuple):
    """A model in this process, and the memory for its adapters."""

    spec: ModelSpec
    plan: MemoryPlan
    runner: ModelRunner
    store: AdapterStore
    tokenizer: Tokenizer | None
    path: Path


def plan_parts(config: EngineConfig, shard: Shard) -> MemoryPlan:
    """What a rank's process would allocate. Raises ConfigError if its share of the model does not fit, or
    there are fewer devices than ranks."""
    device = resolve_device(config.device)
    if device == "cuda" and shard.size > 1:
        import torch

        if shard.rank >= torch.cuda.device_count():
            raise ConfigError(
                f"tensor_parallel_size={shard.size}: there are {torch.cuda.device_count()} CUDA devices, and "
                "every rank needs one; lower tensor_parallel_size"
            )
        torch.cuda.set_device(shard.rank)
    return plan_memory(read_spec(resolve_model(config.model)), config, device=device)


def build_parts(
    config: EngineConfig,
    progress: LoadProgress | None = None,
    group: Group | None = None,
    plan: MemoryPlan | None = None,
    *,
    tokenizer: bool = True,
) -> Parts:
    """Load the model, or this rank's share of it, and allocate everything that ``plan`` names (None: what
    fits now).

    Raises ConfigError if the model cannot be had, is not supported, or does not fit.
    """
    import torch  # only an engine that starts needs it

    from aioengine.adapters.store import AdapterStore
    from aioengine.model.decode_graphs import DecodeLimits
    from aioengine.model.runner import ModelRunner

    path = resolve_model(config.model, progress)
    spec = read_spec(path)
    group = SoloGroup() if group is None else group
    if plan is None:
        plan = plan_memory(spec, config, device=resolve_device(config.device))
    one_of_many = plan.device == "cuda" and group.shard.size > 1
    device = f"cuda:{group.shard.rank}" if one_of_many else plan.device
    graphs = plan.device == "cuda" and config.cuda_graphs
    lora = config.lora
    lora_dtype = getattr(torch, plan.lora_dtype)
    max_rank, modules = (1, ()) if lora is None else (lora.max_lora_rank, lora.modules)
    runner = ModelRunner(
        spec,
        path,
        dtype=getattr(torch, plan.dtype),
        device=device,
        num_blocks=plan.num_blocks,
        block_size=plan.block_size,
        max_loras=plan.num_slots,
        max_lora_rank=max_rank,
        lora_dtype=lora_dtype,
        target_modules=modules,
        quantization=config.quantization,
        progress=progress,
        group=group,
        fixed_decode=DecodeLimits(config.max_num_seqs, plan.max_model_len) if graphs else None,
    )
    store = AdapterStore(
        spec,
        max_rank=max_rank,
        target_modules=modules,
        dtype=lora_dtype,
        weights=runner.decoder.base_weight,
        pin_memory=plan.device == "cuda",
        allow_nonfinite=lora is not None and lora.allow_nonfinite,
        shard=group.shard,
    )
    found = load_tokenizer(path, config.chat_template) if tokenizer else None
    return Parts(spec, plan, runner, store, found, path)


def build(
    config: EngineConfig, resolver: AdapterResolver | None, progress: LoadProgress | None = None
) -> Built:
    """Everything that takes time when an engine starts. Raises ConfigError, as :func:`build_parts`, and
    if ``adapter_root`` is no folder."""
    lora = LoRAConfig() if config.lora is None else config.lora
    chosen = _choose_resolver(config, resolver)
    parts = build_parts(config, progress)
    executor = ThreadExecutor(parts.runner)
    loader = AdapterLoader(
        parts.store, executor, retries=lora.load_retries, timeout=lora.load_timeout, seed=config.seed
    )
    return Built(parts.spec, parts.plan, parts.tokenizer, executor, loader, chosen, parts.path)


async def build_with_workers(
    config: EngineConfig,
    resolver: AdapterResolver | None,
    progress: LoadProgress | None,
    work: ThreadPoolExecutor,
) -> Built:
    """As :func:`build`, with the model in processes of its own; what blocks is done in ``work``. Raises
    EngineDead, too, if one of them ends."""
    lora = LoRAConfig() if config.lora is None else config.lora
    loop = asyncio.get_running_loop()
    chosen = await loop.run_in_executor(work, _choose_resolver, config, resolver)
    path = await loop.run_in_executor(work, resolve_model, config.model, progress)
    spec = await loop.run_in_executor(work, read_spec, path)
    # The policy is the engine's business, and may not fit into a message.
    theirs = msgspec.structs.replace(config, model=str(path.absolute()), policy="fcfs")
    executor = ProcessExecutor(theirs)
    reading = loop.run_in_executor(work, load_tokenizer, path, config.chat_template)
    plan = msgspec.msgpack.decode(await executor.start(progress), type=MemoryPlan)
    plan = msgspec.structs.replace(plan, num_blocks=executor.num_blocks)
    try:
        tokenizer = await reading
    except BaseException:
        await executor.close()
        raise
    loader = WorkerLoader(executor, retries=lora.load_retries, timeout=lora.load_timeout, seed=config.seed)
    return Built(spec, plan, tokenizer, executor, loader, chosen, path)


def _choose_resolver(config: EngineConfig, resolver: AdapterResolver | None) -> AdapterResolver | None:
    """Raises ConfigError if ``adapter_root`` is no folder."""
    if config.lora is None:
        return None
    root = config.lora.adapter_root
    below_root = None if root is None else FilesystemResolver(root)
    return resolver or below_root


def choose_policy(config: EngineConfig, policy: SchedulerPolicy | None) -> SchedulerPolicy:
    """The instance, or else the one that ``config.policy`` names. Raises PolicyError."""
    if policy is None:
        try:
            return load_policy(config.policy)
        except ValueError as error:
            raise PolicyError(str(error)) from error
    if not isinstance(policy, SchedulerPolicy):
        raise PolicyError(f"policy must be a SchedulerPolicy, not {type(policy).__name__}")
    return policy


def load_tokenizer(path: Path, chat_template: str | None = None) -> Tokenizer | None:
    """The tokenizer that comes with a model folder or GGUF file; None if there is none.

    ``chat_template`` is a file that takes the place of the model's own. Raises ConfigError if it cannot be
    read or is no template.
    """
    from aioengine.model.text.tokenizer import Tokenizer  # imports tokenizers

    if path.suffix != ".gguf":
        tokenizer = Tokenizer.from_dir(path)
    else:
        from aioengine.model.text import gguf_tokenizer  # optional dependency

        found = gguf_tokenizer.build_tokenizer(path)
        own = gguf_tokenizer.chat_template(path)
        tokenizer = None if found is None else Tokenizer.from_tokenizer(found, chat_template=own)
    if tokenizer is not None and chat_template is not None:
        tokenizer.use_chat_template(Path(chat_template))
    return tokenizer


def core_limits(config: EngineConfig, parts: Built) -> CoreLimits:
    lora = config.lora
    cpu_max_bytes = parts.plan.cpu_max_bytes
    return CoreLimits(
        num_slots=parts.plan.num_slots,
        cpu_capacity=parts.plan.cpu_capacity,
        max_loads=1 if lora is None else lora.max_concurrent_loads,
        num_blocks=parts.plan.num_blocks,
        block_size=parts.plan.block_size,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=parts.plan.max_model_len,
        prefix_caching=config.enable_prefix_caching,
        max_waiting=config.max_waiting,
        max_waiting_per_tenant=config.max_waiting_per_tenant,
        max_waiting_per_adapter=config.max_waiting_per_adapter,
        eos_token_ids=parts.spec.eos_token_ids,
        seed=config.seed,
        cpu_max_bytes=None if cpu_max_bytes is None else cpu_max_bytes * parts.plan.num_ranks,
        policy_time_budget=config.policy_time_budget,
        policy_max_overruns=config.policy_max_overruns,
        max_step_seconds=_max_step_seconds(config, parts.plan),
        pair_tokens=parts.spec.pair_tokens,
    )


def _max_step_seconds(config: EngineConfig, plan: MemoryPlan) -> float | None:
    if config.max_step_seconds is None and plan.device == "cpu":
        return CPU_STEP_SECONDS
    return config.max_step_seconds
