"""Builds an engine's parts. Blocks, so it runs in a thread. Imports torch."""

from __future__ import annotations

import asyncio
import logging
import platform
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from aioengine.adapters.resolvers.base import AdapterResolver
from aioengine.adapters.resolvers.filesystem import FilesystemResolver
from aioengine.adapters.resolvers.fsspec import FsspecResolver
from aioengine.config import WAITING_BOUNDS, EngineConfig
from aioengine.core import CoreLimits
from aioengine.errors import PolicyError
from aioengine.executors.base import Device
from aioengine.executors.parts import build_parts, plan_parts
from aioengine.executors.process.device import ProcessDevice
from aioengine.executors.process.workers import Workers
from aioengine.executors.ray.workers import RayWorkers
from aioengine.executors.thread import ThreadDevice
from aioengine.info import EngineInfo, LoadProgress
from aioengine.memory_plan import MemoryPlan
from aioengine.model.cuda.failures import typed_failures
from aioengine.model.files.resolve import read_spec, resolve_model
from aioengine.model.files.sources import is_source
from aioengine.model.spec import ModelSpec
from aioengine.schedulers import CostsView, SchedulerPolicy, load_policy
from aioengine.step import StepBatch

if TYPE_CHECKING:
    from aioengine.model.text.tokenizer import Tokenizer

logger = logging.getLogger("aioengine")

CPU_STEP_SECONDS = 0.2
"""Default of ``max_step_seconds`` on a CPU, where shorter chunks cost almost nothing. A GPU computes a full
step in less time, and would be idle between shorter ones."""


class Built(NamedTuple):
    """The parts of an engine."""

    spec: ModelSpec
    plan: MemoryPlan
    tokenizer: Tokenizer | None
    device: Device
    resolver: AdapterResolver | None
    model_path: Path | None = None
    """The model's folder or file; None if there is no model."""
    first_steps: Sequence[tuple[StepBatch, float]] = ()
    """Warm-up steps taken at start, and their seconds."""
    metrics: bool = True
    """Whether events are counted in the engine's metrics."""
    costs: CostsView | None = None
    """Times of steps and moves, for policies; None: they are measured."""
    virtual: bool = False
    """Whether the loop's clock stands still while the loop is busy, and measures decisions, too."""


async def build(
    config: EngineConfig,
    resolver: AdapterResolver | None,
    progress: LoadProgress | None,
    work: ThreadPoolExecutor,
) -> Built:
    """Do everything that takes time when an engine starts; blocking work is done in ``work``. Raises
    ConfigError as :func:`plan_parts` does, and if ``adapter_root`` is no folder; EngineDead if a process of
    the model ends."""
    run = partial(asyncio.get_running_loop().run_in_executor, work)
    chosen = await run(_choose_resolver, config, resolver)
    path = await run(resolve_model, config.model, progress)
    tokenizer = await run(_load_tokenizer, path, config.chat_template)
    # The Hub is not asked twice; and a message to a process might not be able to hold the policy.
    theirs = msgspec.structs.replace(config, model=str(path.absolute()), policy="fcfs")
    if config.executor == "thread":
        spec, plan, device = await run(_build_here, theirs, progress)
        return Built(spec, plan, tokenizer, device, chosen, path)
    spec = await run(read_spec, path, config.model_impl)
    kind = RayWorkers if config.executor == "ray" else Workers
    device = ProcessDevice(theirs, kind, vocab=spec.vocab_size)
    return Built(spec, await device.start(), tokenizer, device, chosen, path)


def _load_tokenizer(path: Path, chat_template: str | None) -> Tokenizer | None:
    from aioengine.model.text.tokenizer import Tokenizer  # imports tokenizers

    return Tokenizer.load(path, chat_template)


def _build_here(config: EngineConfig, progress: LoadProgress | None) -> tuple[ModelSpec, MemoryPlan, Device]:
    """Build what runs the model in this process."""
    planned = plan_parts(config, progress=progress)
    with typed_failures():
        runner, store = build_parts(config, planned, progress=progress)
    return planned.spec, planned.memory, ThreadDevice(runner, store, config.lora, config.seed)


def _choose_resolver(config: EngineConfig, resolver: AdapterResolver | None) -> AdapterResolver | None:
    """Choose the resolver. Raises ConfigError if ``adapter_root`` is no folder, or a URL whose extra is
    missing."""
    if config.lora is None:
        return None
    root = config.lora.adapter_root
    if resolver is not None or root is None:
        return resolver
    return FsspecResolver(root) if is_source(root) else FilesystemResolver(root)


def choose_policy(config: EngineConfig, policy: SchedulerPolicy | None) -> SchedulerPolicy:
    """Return the given policy, or else the one that ``config.policy`` names. Raises PolicyError."""
    if policy is None:
        try:
            return load_policy(config.policy)
        except ValueError as error:
            raise PolicyError(str(error)) from error
    if not isinstance(policy, SchedulerPolicy):
        raise PolicyError(f"policy must be a SchedulerPolicy, not {type(policy).__name__}")
    return policy


def engine_info(version_: str, config: EngineConfig, built: Built) -> EngineInfo:
    """Describe what runs here, and log it."""
    from importlib.metadata import version  # slow to import

    variance = built.device.variance
    invariance = "on" if variance is None else f"off ({variance})"
    logger.info("kernels: %s; batch invariance: %s", built.device.kernels or "none", invariance)
    return EngineInfo(
        version=version_,
        kernels=built.device.kernels,
        python=platform.python_version(),
        torch=version("torch"),
        model_impl=built.spec.impl,
        quantization=config.quantization,
        batch_invariant=variance is None,
    )


def core_limits(config: EngineConfig, parts: Built) -> CoreLimits:
    lora, plan, spec = config.lora, parts.plan, parts.spec
    max_step_seconds = config.max_step_seconds
    if max_step_seconds is None and plan.device == "cpu":
        max_step_seconds = CPU_STEP_SECONDS
    return CoreLimits(
        num_slots=plan.num_slots,
        cpu_capacity=0 if lora is None else lora.cpu_capacity,
        max_loads=1 if lora is None else lora.max_concurrent_loads,
        num_blocks=plan.num_blocks,
        block_size=plan.block_size,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=plan.max_model_len,
        prefix_caching=config.enable_prefix_caching,
        **{name: getattr(config, name) for name in WAITING_BOUNDS},
        eos_token_ids=spec.eos_token_ids,
        seed=config.seed,
        cpu_max_bytes=None if plan.cpu_max_bytes is None else plan.cpu_max_bytes * plan.num_ranks,
        slot_memory=plan.slot_memory,
        slot_bytes=plan.slot_bytes,
        policy_time_budget=config.policy_time_budget,
        max_step_seconds=max_step_seconds,
        pair_tokens=spec.pair_tokens,
        speculation=config.speculation,
        draft_constrained=config.executor == "thread",
    )
