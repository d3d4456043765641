"""Putting an engine's parts together: blocking, so it runs in a thread. Imports torch."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from aioengine.adapters.filesystem_resolver import FilesystemResolver
from aioengine.adapters.loader import AdapterLoader
from aioengine.adapters.resolver import AdapterResolver
from aioengine.config import EngineConfig, LoRAConfig
from aioengine.core import CoreLimits
from aioengine.errors import PolicyError
from aioengine.executors.base import Executor
from aioengine.executors.thread import ThreadExecutor
from aioengine.info import LoadProgress
from aioengine.memory_plan import MemoryPlan, plan_memory, resolve_device
from aioengine.model.files import read_spec, resolve_model
from aioengine.model.spec import ModelSpec
from aioengine.moves import Loader
from aioengine.schedulers import SchedulerPolicy, load_policy

if TYPE_CHECKING:
    from aioengine.adapters.store import AdapterStore
    from aioengine.model.runner import ModelRunner
    from aioengine.model.tokenizer import Tokenizer


class Built(NamedTuple):
    """What an engine is put together from."""

    spec: ModelSpec
    plan: MemoryPlan
    tokenizer: Tokenizer | None
    executor: Executor
    loader: Loader
    resolver: AdapterResolver | None
    timer: Callable[[], float] = time.perf_counter
    """What decisions, and the event loop's lag, are measured with."""


class Parts(NamedTuple):
    """A model in this process, and the memory for its adapters."""

    spec: ModelSpec
    plan: MemoryPlan
    runner: ModelRunner
    store: AdapterStore
    tokenizer: Tokenizer | None


def build_parts(config: EngineConfig, progress: LoadProgress | None = None) -> Parts:
    """Load the model and allocate everything that the plan names.

    Raises ConfigError if the model cannot be had, is not supported, or does not fit.
    """
    import torch  # only an engine that starts needs it

    from aioengine.adapters.store import AdapterStore
    from aioengine.model.runner import ModelRunner

    path = resolve_model(config.model, progress)
    spec = read_spec(path)
    device = resolve_device(config.device)
    plan = plan_memory(spec, config, device=device)
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
        progress=progress,
    )
    store = AdapterStore(
        spec,
        max_rank=max_rank,
        target_modules=modules,
        dtype=lora_dtype,
        weights=runner.decoder.base_weight,
        pin_memory=device == "cuda",
        allow_nonfinite=lora is not None and lora.allow_nonfinite,
    )
    return Parts(spec, plan, runner, store, load_tokenizer(path))


def build(
    config: EngineConfig, resolver: AdapterResolver | None, progress: LoadProgress | None = None
) -> Built:
    """Everything that takes time when an engine starts. Raises ConfigError, as :func:`build_parts`, and
    if ``adapter_root`` is no folder."""
    lora = LoRAConfig() if config.lora is None else config.lora
    below_root = None if lora.adapter_root is None else FilesystemResolver(lora.adapter_root)
    parts = build_parts(config, progress)
    executor = ThreadExecutor(parts.runner)
    loader = AdapterLoader(
        parts.store, executor, retries=lora.load_retries, timeout=lora.load_timeout, seed=config.seed
    )
    chosen = None if config.lora is None else resolver or below_root
    return Built(parts.spec, parts.plan, parts.tokenizer, executor, loader, chosen)


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


def load_tokenizer(path: Path) -> Tokenizer | None:
    """The tokenizer that comes with a model folder or GGUF file; None if there is none."""
    from aioengine.model.tokenizer import Tokenizer  # imports tokenizers

    if path.suffix != ".gguf":
        return Tokenizer.from_dir(path)
    from aioengine.model import gguf_tokenizer  # optional dependency

    found = gguf_tokenizer.build_tokenizer(path)
    if found is None:
        return None
    return Tokenizer.from_tokenizer(found, chat_template=gguf_tokenizer.chat_template(path))


def core_limits(config: EngineConfig, parts: Built) -> CoreLimits:
    lora = config.lora
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
        eos_token_ids=parts.spec.eos_token_ids,
        seed=config.seed,
        cpu_max_bytes=parts.plan.cpu_max_bytes,
        policy_time_budget=config.policy_time_budget,
        policy_max_overruns=config.policy_max_overruns,
    )
