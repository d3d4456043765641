"""The form that ``EngineConfig.quantization`` gives to weights, by device. No torch here."""

from __future__ import annotations

import msgspec

from aioengine.errors import ConfigError
from aioengine.model.files.packing import Packing
from aioengine.model.parallel.group import Shard
from aioengine.model.parallel.partition import Partition
from aioengine.model.spec import ModelSpec, Quantization

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
                packing = msgspec.structs.replace(packing, rounds=device != "cpu")
                packed[spec.module_name(*place)] = packing
    return msgspec.structs.replace(spec, packed=packed)


def packing_of(quantization: Quantization, k: int) -> Packing | None:
    """Return the packing of a weight of ``k`` inputs; None: it stays plain, because no group divides it."""
    if quantization == "int4":
        group = next((size for size in _GROUPS if k % size == 0), None)
        return None if group is None else Packing(format="int4", group=group, zeros=True)
    return None if quantization == "none" else Packing(format=quantization)
