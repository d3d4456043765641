"""Quantized linears: those of a Hugging Face folder (``quantization_config``), and the forms that
``EngineConfig.quantization`` gives to others. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from aioengine.errors import ConfigError
from aioengine.model.experts.spec import MixtureSpec
from aioengine.model.files.folder import tensors
from aioengine.model.files.methods.compressed_tensors import compressed_tensors
from aioengine.model.files.methods.fp8 import fp8
from aioengine.model.files.methods.gptq import awq, gptq
from aioengine.model.files.methods.scheme import BlocksOf
from aioengine.model.files.packing import Packing
from aioengine.model.files.stacked_experts import unstacked
from aioengine.model.files.stored import Checkpoint, Stored, StoredBlocks
from aioengine.model.parallel.group import Shard
from aioengine.model.parallel.partition import Partition
from aioengine.model.spec import ModelSpec, Quantization

_SCHEMES: dict[str, Callable[[Path, Mapping[str, Any]], BlocksOf]] = {
    "gptq": gptq,
    "awq": awq,
    "compressed-tensors": compressed_tensors,
    "fp8": fp8,
    "fbgemm_fp8": fp8,
}


def with_packed(spec: ModelSpec, checkpoint: Checkpoint) -> ModelSpec:
    """Return the model with the quantized weights of its checkpoint that can stay so."""
    packed = {}
    for name, stored in checkpoint.items():
        if not isinstance(stored, StoredBlocks):
            continue
        place = spec.find_module(module := name.removesuffix(".weight"))
        if place is not None and place[1] not in spec.plain_modules:
            packed[module] = stored.packing
    return msgspec.structs.replace(spec, packed=packed)


def read_folder(path: Path, spec: ModelSpec, config: Any) -> Checkpoint:
    """Return the parameters of a Hugging Face folder, whose ``config.json`` has this ``quantization_config``
    (None: none). Raises :class:`ConfigError`, naming file, tensor or method, for what is wrong or not
    supported."""
    if isinstance(spec, MixtureSpec) and spec.interleaved:
        return unstacked(path, spec, tensors(path))
    return {**tensors(path)} if config is None else _quantized(path, config)


def _quantized(path: Path, config: Any) -> Checkpoint:
    """Bring together the tensors of each quantized linear; return them beside the others."""
    method = config.get("quant_method") if isinstance(config, dict) else None
    if method not in _SCHEMES:
        raise ConfigError(
            f"{path}/config.json: quantization_config.quant_method={method!r}: not supported; supported: "
            f"{', '.join(_SCHEMES)}; give the unquantized model, with quantization='int8' or 'int4', or "
            "a GPTQ, AWQ or GGUF checkpoint of it"
        )
    blocks_of, every = _SCHEMES[method](path, config), tensors(path)
    modules: dict[str, dict[str, Stored]] = {}
    for name in every:
        module, _, kind = name.rpartition(".")
        if kind != "bias":
            modules.setdefault(module, {})[kind] = every[name]
    found: Checkpoint = {**every}
    for module, parts in modules.items():
        if (weight := blocks_of(module, parts)) is not None:
            for kind in parts:
                del found[f"{module}.{kind}"]
            found[f"{module}.weight"] = weight
    return found


_GROUPS = (64, 32, 16, 8)
"""Sizes of int4 groups, the best first: 64 inputs take 4.75 bits each, scale and zero point included."""


def with_quantization(spec: ModelSpec, quantization: Quantization, device: str, ranks: int = 1) -> ModelSpec:
    """Return the model with the packings of the weights that are quantized while they are loaded, on a device
    ("cpu" or "cuda"). Groups of inputs are whole for each of the ``ranks``.

    int8 and int4 on a CPU are not among them: the compiled library packs loaded weights into its own forms.
    Raises ConfigError for a model that transformers runs.
    """
    if quantization == "none":
        return spec
    if spec.impl != "native":
        raise ConfigError(
            f"quantization={quantization!r}: it is for models that the native decoder runs, and transformers "
            "runs this one; set quantization='none'"
        )
    packed = {}
    if quantization == "fp8" or device != "cpu":
        shares = Partition(spec, Shard(0, ranks))
        for place in spec.quantized_modules():
            size = spec.stored_shape(place[1]).in_features
            if ranks > 1 and place[1] != "embed_tokens":  # which is split over its rows
                part = shares.inputs(place[1])
                size = part.stop - part.start
            packing = packing_of(quantization, size)
            if packing is not None:
                packed[spec.module_name(*place)] = packing
    return msgspec.structs.replace(spec, packed=packed)


def packing_of(quantization: Quantization, k: int) -> Packing | None:
    """Return the packing of a weight of ``k`` inputs; None: it stays plain, because no group divides it."""
    if quantization == "int4":
        group = next((size for size in _GROUPS if k % size == 0), None)
        return None if group is None else Packing(format="int4", group=group, zeros=True)
    return None if quantization == "none" else Packing(format=quantization)
