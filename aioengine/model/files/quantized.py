"""Quantized linears: those of a Hugging Face folder (``quantization_config``), and the forms that
``EngineConfig.quantization`` gives to others. No torch here."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from aioengine.errors import ConfigError
from aioengine.model.files import folder
from aioengine.model.files.methods.awq import awq
from aioengine.model.files.methods.compressed_tensors import compressed_tensors
from aioengine.model.files.methods.fp8 import fp8
from aioengine.model.files.methods.gptq import gptq
from aioengine.model.files.methods.scheme import CheckpointErrors, Header, Layout, LayoutOf
from aioengine.model.files.packing import Packing
from aioengine.model.parallel.group import Shard
from aioengine.model.parallel.partition import Partition
from aioengine.model.spec import ModelSpec, Quantization

_SCHEMES: dict[str, Callable[[Path, Mapping[str, Any]], LayoutOf]] = {
    "gptq": gptq,
    "awq": awq,
    "compressed-tensors": compressed_tensors,
    "fp8": fp8,
    "fbgemm_fp8": fp8,
}


def with_packed(spec: ModelSpec, packings: Mapping[str, Packing]) -> ModelSpec:
    """Return the model with those weights packed, by the names of their modules, that can stay so."""
    packed = {}
    for name, packing in packings.items():
        place = spec.find_module(name)
        if place is not None and place[0] < spec.num_layers and place[1] not in spec.plain_modules:
            packed[name] = packing
    return msgspec.structs.replace(spec, packed=packed)


class QuantizedFolder:
    """The quantized linears of a folder whose ``config.json`` has a ``quantization_config``.

    Raises :class:`ConfigError`, naming the method, for what is not supported.
    """

    def __init__(self, path: Path, config: Any) -> None:
        method = config.get("quant_method") if isinstance(config, dict) else None
        if method not in _SCHEMES:
            raise ConfigError(
                f"{path}/config.json: quantization_config.quant_method={method!r}: not supported; supported: "
                f"{', '.join(_SCHEMES)}; give the unquantized model, with quantization='int8' or 'int4', or "
                "a GPTQ, AWQ or GGUF checkpoint of it"
            )
        layout_of, layout_errors = _SCHEMES[method](path, config), CheckpointErrors(path, method)
        modules: dict[str, dict[str, Header]] = {}
        for key, header in folder.headers(path).items():
            module, _, kind = key.rpartition(".")
            if kind != "bias":
                modules.setdefault(module, {})[kind] = header
        self.kinds: dict[str, frozenset[str]] = {}
        """The tensors of each quantized linear, by the last parts of their names."""
        self.layouts: dict[str, Layout] = {}
        """The quantized linears by name."""
        for module, found in modules.items():
            layout = layout_of(module, found)
            if layout is not None:
                layout_errors.check(module, found, layout)
                self.layouts[module], self.kinds[module] = layout, frozenset(found)


def quantized_folder(path: Path) -> QuantizedFolder | None:
    """Return the quantized linears of a folder; None if its ``config.json`` speaks of none, or is not
    readable."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    except (OSError, ValueError, AttributeError):
        return None
    return None if config is None else QuantizedFolder(path, config)


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
