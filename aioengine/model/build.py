"""Builds the runner of a model on a device: weights, KV cache, adapter slots, and what computes with them."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from aioengine.errors import ConfigError
from aioengine.info import LoadProgress
from aioengine.kernels import get_backend
from aioengine.model import coverage
from aioengine.model.decoder import Decoder
from aioengine.model.experts.spec import MixtureSpec
from aioengine.model.files.quantized import with_quantization
from aioengine.model.files.weights import load_weights
from aioengine.model.generic.spec import GenericSpec
from aioengine.model.kv_cache import KVCache
from aioengine.model.model import Model
from aioengine.model.parallel.group import Group, SoloGroup
from aioengine.model.parallel.partition import Partition
from aioengine.model.pooling import model_pooling
from aioengine.model.runner import ModelRunner, Sampler
from aioengine.model.slots.pool import LoRASlots
from aioengine.model.spec import ModelSpec, Quantization

if TYPE_CHECKING:
    from aioengine.model.decode_graphs import DecodeLimits, Record

logger = logging.getLogger("aioengine")


def build_runner(
    spec: ModelSpec,
    weights: Path,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    num_blocks: int,
    block_size: int,
    max_loras: int = 0,
    max_lora_rank: int = 16,
    max_trained_tokens: int = 0,
    slot_memory: int | None = None,
    lora_dtype: torch.dtype | None = None,
    target_modules: Iterable[str] | None = None,
    sample: Sampler | None = None,
    kernels: str | None = None,
    max_model_len: int | None = None,
    quantization: Quantization = "none",
    kv_cache_dtype: str = "auto",
    progress: LoadProgress | None = None,
    group: Group | None = None,
    fixed_decode: DecodeLimits | None = None,
    record: Record | None = None,
) -> ModelRunner:
    """Load a model folder or GGUF file, or one rank's share of it, and allocate what steps need.

    Args:
        max_loras: 0 leaves LoRA out; then there are no slots.
        slot_memory: Bytes that the slots share; None: each has a place for ``max_lora_rank`` and
            ``max_trained_tokens``.
        sample: Replaces the default, as ``kernels`` (a backend's name) does.
        max_model_len: The longest sequence. It matters to models that transformers runs.
        quantization: How the linears' weights are kept.
        kv_cache_dtype: "auto" (``dtype``), "int8" or "fp8".
        group: Of several ranks all must be built.
        fixed_decode: Decode steps within these limits are recorded and played back, if the kernels allow for
            it, by ``record`` (None: as CUDA graphs).

    Raises :class:`~aioengine.errors.ConfigError` if the weights do not fit ``spec``, if that cannot be
    divided, or if they cannot be quantized here.
    """
    device, group = torch.device(device), group or SoloGroup()
    shard = group.shard
    spec = with_quantization(spec, quantization, device.type, shard.size)
    if spec.packed:
        quantization = "none"  # for what is packed once it is loaded
    if progress is not None:
        progress("Preparing the kernels (compiled once, at the first start)", 0, 1)
    try:
        backend = get_backend(device.type, kernels)
    except ValueError as error:  # of AIOENGINE_KERNELS
        raise ConfigError(str(error)) from error
    coverage.check_kv_cache(kv_cache_dtype, spec, backend.name)
    local = Partition(spec, shard).local
    cache = KVCache(local, num_blocks, block_size, dtype, device, kv_cache_dtype)
    slots: LoRASlots | None = None
    if max_loras > 0:
        slots = LoRASlots(
            spec,
            max_loras,
            max_lora_rank,
            spec.targets(None) if target_modules is None else target_modules,
            lora_dtype or dtype,
            device,
            shard,
            nbytes=slot_memory,
            affine_dtype=dtype,
            max_tokens=max_trained_tokens,
            turned=backend.name == "cpu" and lora_dtype in (None, dtype, torch.int8),
        )
    model: Model
    uncovered = coverage.not_covered(
        local,
        backend.name,
        dtype=_name(dtype),
        lora_dtype=None if slots is None else _name(lora_dtype or dtype),
        block_size=block_size,
        shard=shard,
    )
    if isinstance(spec, GenericSpec):
        from aioengine.model.generic import probe  # these import transformers
        from aioengine.model.generic.model import GenericModel

        longest = max_model_len or min(spec.max_position, 8192)
        model = GenericModel(spec, weights, dtype, device, backend, cache, slots, longest, progress)
        probe.check(model)
    elif uncovered is None:
        from aioengine.model.native import NativeDecoder

        model = native = NativeDecoder(spec, dtype, device, backend, cache, slots, group)
        load_weights(native, weights, progress)
        native.finish(quantization)
    else:
        if backend.name == "cpu":
            logger.info("the compiled CPU step does not cover %s; steps run through torch", uncovered)
        _check_compiled("quantization", quantization, "none", uncovered)
        _check_compiled("kv_cache_dtype", kv_cache_dtype.replace("fp8", "auto"), "auto", uncovered)
        model = decoder = Decoder(spec, dtype, device, backend, cache, slots, group)
        load_weights(decoder, weights, progress)
    played = None
    plain = spec.impl == "native" and not isinstance(spec, MixtureSpec)
    if fixed_decode is not None and plain and backend.capturable:
        from aioengine.model.decode_graphs import CudaGraphs, DecodeSteps

        played = DecodeSteps(model, spec.vocab_size, fixed_decode, record or CudaGraphs(device))
    return ModelRunner(
        model,
        spec,
        group,
        pooling=model_pooling(weights),
        variance=coverage.variance(uncovered, shard.size),
        decode_steps=played,
        sample=sample,
    )


def _check_compiled(field: str, value: str, plain: str, uncovered: str) -> None:
    """Raise ConfigError for a setting that only the compiled step has."""
    if value != plain:
        raise ConfigError(
            f"{field}={value!r}: only the compiled CPU step has it, which needs a C++ compiler "
            f"(docs/kernels.md) and does not cover {uncovered}; set {field}={plain!r}"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
