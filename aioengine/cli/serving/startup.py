"""The line of the log with everything that determines the speed of this server."""

from __future__ import annotations

import logging
import os
import sys

from aioengine.checks import format_bytes
from aioengine.engine import AsyncEngine

logger = logging.getLogger("aioengine.server")


def tell_what_runs(engine: AsyncEngine) -> None:
    """Log the model, the kernels, the memory and the limits."""
    threads = os.cpu_count()
    if "torch" in sys.modules:  # not imported just for this, because that takes seconds
        from aioengine.model.parallel.threads import rank_threads

        threads = rank_threads(1)
    config, plan = engine.config, engine.plan
    fields: dict[str, object] = {
        "model": engine.model_name,
        **engine.build,
        "device": plan.device,
        "dtype": plan.dtype,
        "threads": threads,
        "executor": config.executor,
        "tensor_parallel_size": config.tensor_parallel_size,
        "policy": config.policy if isinstance(config.policy, str) else type(config.policy).__name__,
        "slots": plan.num_slots,
        "cpu_adapters": plan.cpu_capacity,
        "kv_tokens": plan.num_blocks * plan.block_size,
        "kv_memory": format_bytes(plan.num_blocks * plan.block_bytes),
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "max_model_len": plan.max_model_len,
        "prefix_caching": config.enable_prefix_caching,
    }
    line = " ".join(f"{name}={value}" for name, value in fields.items())
    logger.info("engine: %s", line, extra={"data": fields})
