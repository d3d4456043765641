"""The formats of compressed-tensors (llm-compressor) that are weights of 4 or 8 bits.

"pack-quantized": ``weight_packed`` [n, k / 8] has codes along the inputs in each int32, the lowest first,
with half of their range added; "int-quantized": ``weight`` [n, k] int8; "float-quantized": float8. Beside
them ``weight_scale`` [n, groups], [n, 1] or [1], and, for what is not symmetric, ``weight_zero_point``;
``weight_g_idx`` [k] has the group of each input where inputs are ordered. Scales of activations are not used.
These stay in the compute dtype, which is more exact, except on CUDA for many rows, if the checkpoint rounds
them with scales of their own ("dynamic").
https://github.com/vllm-project/compressed-tensors
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aioengine.model.files.methods import scheme
from aioengine.model.files.methods.fp8 import FP8
from aioengine.model.files.packing import Packing

if TYPE_CHECKING:
    from torch import Tensor

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")


class CompressedTensors:
    """The scheme "compressed-tensors"."""

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        self._wrong = wrong = scheme.Wrong(path, "compressed-tensors")
        groups = config.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise wrong.setting("config_groups", groups, "must be a JSON object of groups")
        for key in ("sparsity_config", "transform_config"):
            value = config.get(key)
            if value and not (isinstance(value, dict) and value.get("format") == "dense"):
                raise wrong.setting(key, "{...}", "is not supported; use a checkpoint without it")
        settings = [self._weights(name, group, config) for name, group in groups.items()]
        if any(other != settings[0] for other in settings):
            raise wrong.setting(
                "config_groups", list(groups), "different settings for groups are not supported"
            )
        self._format, self._bits, self._symmetric, self._group, block = settings[0]
        inputs = [group.get("input_activations") for group in groups.values()]
        self._rounds = all(
            isinstance(x, dict) and x.get("num_bits") == 8 and x.get("dynamic") for x in inputs
        )
        settings_of_float = {"activation_scheme": "dynamic" if self._rounds else "static"}
        self._float = FP8(
            path, {**settings_of_float, "weight_block_size": block, "quant_method": "compressed-tensors"}
        )

    def _weights(
        self, name: str, group: Any, config: Mapping[str, Any]
    ) -> tuple[str, int, bool, int, list[int] | None]:
        where = f"config_groups.{name}"
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            raise self._wrong.setting(where, group, "must have settings for weights")
        stored = group.get("format") or config.get("format")
        if stored not in _FORMATS:
            raise self._wrong.setting("format", stored, f"supported: {', '.join(_FORMATS)}")
        bits: Any = weights.get("num_bits")
        kind = weights.get("type", "int")
        if kind not in ("int", "float") or bits not in ((8,) if kind == "float" else (4, 8)):
            raise self._wrong.setting(
                f"{where}.weights", f"{bits} bits of {kind}", "supported: 4 or 8 bits of int, 8 of float"
            )
        size = weights.get("group_size") if weights.get("strategy") == "group" else 0
        if not isinstance(size, int):
            raise self._wrong.setting(f"{where}.weights.group_size", size, "must be an integer")
        block: list[int] | None = (
            weights.get("block_structure") if weights.get("strategy") == "block" else None
        )
        return stored, bits, bool(weights.get("symmetric", True)), max(size, 0), block

    def layout(self, module: str, headers: Mapping[str, scheme.Header]) -> scheme.Layout | None:
        group, words = self._group, headers.get("weight_packed")
        if words is not None:
            each, name = 32 // self._bits, f"{module}.weight_packed"
            n, count = self._wrong.matrix(name, words)
            k = count * each
            zeros = (-(-n // each), -(-k // (group or k))), ("I32",)
            expected: scheme.Expected = {"weight_packed": ((n, count), ("I32",))}
        elif "weight" in headers and headers["weight"].dtype == "I8":
            name = f"{module}.weight"
            n, k = self._wrong.matrix(name, headers["weight"])
            zeros, expected = ((n, -(-k // (group or k))), ("I8",)), {}
        else:
            return self._float.layout(module, headers)
        scheme.check_group(group, k, name, self._wrong)
        four = words is not None and self._bits == 4
        packing = Packing(
            format="int4" if four else "int8",
            group=group,
            zeros=not self._symmetric,
            ordered="weight_g_idx" in headers,
            middle=8 if four else 0,
            rounds=self._rounds,
        )
        scale = headers.get("weight_scale")
        if group or scale is None or scale.shape not in ((), (1,), (n,), (1, 1)):
            expected["weight_scale"] = ((n, packing.groups(k)), scheme.FLOATS)
        if packing.zeros:
            expected["weight_zero_point"] = zeros
        if packing.ordered:
            expected["weight_g_idx"] = ((k,), ("I32", "I64"))
        self._wrong.check(module, headers, expected)
        return scheme.Layout(n, k, packing)

    def fields(self, module: str, layout: scheme.Layout, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        import torch

        packing = layout.packing
        if packing.format == "fp8":
            return self._float.fields(module, layout, tensors)
        words = tensors.get("weight_packed")
        data = (tensors["weight"] if words is None else words.contiguous()).view(torch.uint8)
        if words is not None and packing.format == "int8":
            data = data ^ 128
        scale = tensors["weight_scale"].float()
        found = {"data": data, "scale": scale.reshape(-1, packing.groups(layout.k)).expand(layout.n, -1)}
        if packing.zeros:
            zero = tensors["weight_zero_point"]
            if words is not None:  # packed along the outputs
                zero = scheme.unpack_int32(zero.T, self._bits)[:, : layout.n].T.short()
                zero = zero - 128 if packing.format == "int8" else zero
            found["zero"] = zero.short()
        if packing.ordered:
            group_of = tensors["weight_g_idx"]
            if not 0 <= int(group_of.min()) <= int(group_of.max()) < packing.groups(layout.k):
                raise self._wrong.tensor(f"{module}.weight_g_idx", "names groups that do not exist")
            found["group_of"] = group_of.int()
        return found
