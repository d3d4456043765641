"""Models and settings that the compiled CPU step covers, and those whose tokens do not depend on their batch.
No torch here, so that ``aioengine plan`` can say it before anything is loaded."""

from __future__ import annotations

import os

from aioengine.config import EngineConfig
from aioengine.errors import ConfigError
from aioengine.model.parallel.group import Shard
from aioengine.model.parallel.partition import Partition
from aioengine.model.spec import ModelSpec

PANEL = 16
"""Divisor that sizes must have: the lanes of a vector, and the number of outputs that are packed together."""
DTYPES = ("bfloat16", "float32")


def not_covered(
    spec: ModelSpec, backend: str, *, dtype: str, lora_dtype: str | None, block_size: int, shard: Shard
) -> str | None:
    """Return why the compiled step cannot run this model, or this rank's share of one, with these settings;
    None if it can. ``lora_dtype`` is None without adapters."""
    if backend != "cpu":
        return f"backend {backend!r}"
    if spec.impl != "native":
        return "models that transformers runs"
    for what, size in spec.mlp_sizes.items():
        if size % PANEL:
            return f"{size} as the {what}, no multiple of {PANEL}"
    if dtype not in DTYPES:
        return f"dtype {dtype}"
    if lora_dtype not in (None, dtype, "int8"):
        return f"lora_dtype {lora_dtype} beside dtype {dtype}"
    if block_size % PANEL:
        return f"block_size {block_size}, no multiple of {PANEL}"
    if spec.head_dim % PANEL:
        return f"head_dim {spec.head_dim}, no multiple of {PANEL}"
    widths = (spec.vocab_size, spec.hidden_size)
    if any(width % PANEL for width in widths):
        return f"vocabulary or hidden size of {widths}, not all multiples of {PANEL}"
    if lora_dtype is not None and shard.fully_sharded:
        share = spec.hidden_size // shard.size
        if share % PANEL:
            return f"a rank's share of the hidden size, {share}, no multiple of {PANEL}"
    return None


def check_kv_cache(dtype: str, spec: ModelSpec, backend: str) -> None:
    """Raise ConfigError if a backend ("cpu", "triton", ...) has no cache of this ``kv_cache_dtype`` for a
    model."""
    where, backends, other = {
        "auto": ("every backend", (backend,), ""),
        "int8": ("the compiled CPU step", ("cpu", "torch"), "fp8"),
        "fp8": ("the Triton kernels on CUDA, or plain torch,", ("triton", "torch"), "int8"),
    }[dtype]
    native = spec.impl == "native"
    if dtype == "auto" or (native and backend in backends):
        return
    by = f"{backend!r} computes here" if native else "transformers runs this model"
    raise ConfigError(
        f"kv_cache_dtype={dtype!r}: only {where} has it, and {by}; set "
        f"kv_cache_dtype={other if native else 'auto'!r}"
    )


def check_int8_adapters(dtype: str) -> None:
    """Raise ConfigError where slots cannot be int8."""
    if dtype == "float16":
        raise ConfigError(
            "lora.lora_dtype='int8' with dtype='float16': A's outputs would be too small for float16, "
            "because B is whole numbers; set dtype='bfloat16', or lora_dtype='auto'"
        )


def variance(reason: str | None, ranks: int) -> str | None:
    """Return why a token's bits depend on its batch; None: they do not (docs/determinism.md). ``reason``: why
    there is no compiled step, if there is none."""
    if reason is not None:
        return (
            "the linears are torch's, whose order of sums depends on the batch, "
            f"since the compiled CPU step (docs/kernels.md) does not cover {reason}"
        )
    if ranks > 2:
        return (
            "the order in which more than two ranks add up their parts depends on how long these are "
            f"(tensor_parallel_size={ranks})"
        )
    return None


def check_invariant(config: EngineConfig, found: str | None) -> None:
    """Raise ConfigError if there is a ``variance``, and ``config`` demands that there is none."""
    if found is None:
        return
    if config.batch_invariant is True:
        raise ConfigError(f"batch_invariant=True: {found}; set batch_invariant='auto' to start without it")
    if config.speculation != "none":
        raise ConfigError(
            f"speculation={config.speculation!r}: tokens would depend on the proposals: {found}; set "
            "speculation='none'"
        )


def planned_variance(
    config: EngineConfig, spec: ModelSpec, *, device: str, dtype: str, lora_dtype: str
) -> str | None:
    """Return the ``variance`` that an engine will have, with ``auto`` settings resolved to these; compiles
    and loads nothing.

    Raises ConfigError if ``config`` demands that there is none.
    """
    from aioengine.kernels.cpu.build import obstacle
    from aioengine.kernels.dispatch import ENV

    backend = os.environ.get(ENV, "cpu" if device == "cpu" else "triton")
    if backend == "cpu" and (missing := obstacle()) is not None:
        backend = f"torch ({missing})"
    lora, size = config.lora, config.tensor_parallel_size
    shard = Shard(0, size, lora is not None and lora.fully_sharded_loras)
    reason = not_covered(
        Partition(spec, shard).local,
        backend,
        dtype=dtype,
        lora_dtype=None if lora is None else lora_dtype,
        block_size=config.block_size,
        shard=shard,
    )
    found = variance(reason, size)
    check_invariant(config, found)
    return found


def planned_cpu_level() -> str:
    """Return which instructions the CPU kernels will use, and why no better ones."""
    from aioengine.kernels.cpu.build import described_level

    return described_level()
