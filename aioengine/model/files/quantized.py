"""Quantized linears of a Hugging Face folder, and their forms (``quantization_config``). No torch here."""

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
from aioengine.model.files.methods.scheme import Header, Layout, LayoutOf
from aioengine.model.files.packing import Packing
from aioengine.model.spec import ModelSpec

_SCHEMES: dict[str, Callable[[Path, Mapping[str, Any]], LayoutOf]] = {
    "gptq": gptq,
    "awq": awq,
    "compressed-tensors": compressed_tensors,
    "fp8": fp8,
    "fbgemm_fp8": fp8,
}
_OTHERWISE = (
    "give the unquantized model, with quantization='int8' or 'int4', or a GPTQ, AWQ or GGUF checkpoint of it"
)
_INSTEAD = {
    "bitsandbytes": (
        "bitsandbytes (nf4, fp4, LLM.int8) keeps codes for a table of its own, which no kernel here reads; "
        f"{_OTHERWISE}"
    ),
    "mxfp4": "give a checkpoint in bfloat16, or a GPTQ, AWQ or GGUF one",
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
                f"{', '.join(_SCHEMES)}; {_INSTEAD.get(str(method), _OTHERWISE)}"
            )
        layout_of = _SCHEMES[method](path, config)
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
                self.layouts[module], self.kinds[module] = layout, frozenset(found)


def quantized_folder(path: Path) -> QuantizedFolder | None:
    """Return the quantized linears of a folder; None if its ``config.json`` speaks of none, or is not
    readable."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    except (OSError, ValueError, AttributeError):
        return None
    return None if config is None else QuantizedFolder(path, config)
