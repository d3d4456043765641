"""The formats of compressed-tensors (llm-compressor) that are weights of 4 or 8 bits.

"pack-quantized": ``weight_packed`` [n, k / 8] has codes along the inputs in each int32, the lowest first,
with half of their range added; "int-quantized": ``weight`` [n, k] int8; "float-quantized": float8. Beside
them ``weight_scale`` [n, groups], [n, 1] or [1], and, for what is not symmetric, ``weight_zero_point``.
Activations stay in the compute dtype, which is more exact.
https://github.com/vllm-project/compressed-tensors
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aioengine.model.files.methods import scheme
from aioengine.model.files.methods.fp8 import fp8
from aioengine.model.files.packing import Packing
from aioengine.model.files.stored import Stored, StoredBlocks

if TYPE_CHECKING:
    from torch import Tensor

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")


def compressed_tensors(path: Path, config: Mapping[str, Any]) -> scheme.BlocksOf:
    """Return the way of "compressed-tensors"."""
    method = scheme.Method(path, "compressed-tensors")
    settings = config.get("config_groups")
    if not isinstance(settings, dict) or not settings:
        raise method.setting("config_groups", settings, "must be a JSON object of groups")
    for key in ("sparsity_config", "transform_config"):
        value = config.get(key)
        if value and not (isinstance(value, dict) and value.get("format") == "dense"):
            raise method.setting(key, "{...}", "is not supported; use a checkpoint without it")
    first, *others = (_settings(name, one, config, method) for name, one in settings.items())
    if any(other != first for other in others):
        raise method.setting(
            "config_groups", list(settings), "different settings for groups are not supported"
        )
    _, bits, symmetric, group, block = first
    float_blocks = fp8(path, {"quant_method": "compressed-tensors", "weight_block_size": block})

    def blocks_of(module: str, stored: Mapping[str, Stored]) -> StoredBlocks | None:
        words = stored.get("weight_packed")
        packed, each = words is not None, 32 // bits
        if words is not None:
            n, count = method.matrix(f"{module}.weight_packed", words)
            k = count * each
            expected: scheme.Expected = {"weight_packed": ((n, count), ("I32",))}
        elif "weight" in stored and stored["weight"].dtype == "I8":
            n, k = method.matrix(f"{module}.weight", stored["weight"])
            expected = {}
        else:
            return float_blocks(module, stored)
        if "weight_g_idx" in stored:
            raise method.tensor(
                f"{module}.weight_g_idx", "groups of inputs that are not neighbours are not supported"
            )
        four = packed and bits == 4
        packing = Packing(
            format="int4" if four else "int8",
            group=group,
            zeros=not symmetric,
            middle=8 if four else 0,
        )
        groups = packing.groups(k)
        scale = stored.get("weight_scale")
        if group or scale is None or scale.shape not in ((), (1,), (n,), (1, 1)):
            expected["weight_scale"] = ((n, groups), scheme.FLOATS)
        if packing.zeros:  # packed along the outputs
            zeros = ((-(-n // each), groups), ("I32",)) if packed else ((n, groups), ("I8",))
            expected["weight_zero_point"] = zeros

        def read(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            import torch

            data = tensors["weight_packed" if packed else "weight"].contiguous().view(torch.uint8)
            scale = tensors["weight_scale"].float().reshape(-1, groups).expand(n, -1)
            found = {"data": data if four or not packed else data ^ 128, "scale": scale}
            if packing.zeros:
                zero = tensors["weight_zero_point"]
                if packed:
                    zero = scheme.unpack_int32(zero.T, bits)[:, :n].T.short() - (0 if four else 128)
                found["zero"] = zero.short()
            return found

        return method.blocks(module, stored, (n, k), packing, expected, read)

    return blocks_of


def _settings(
    name: str, group: Any, config: Mapping[str, Any], method: scheme.Method
) -> tuple[str, int, bool, int, list[int] | None]:
    """Return what a group of modules says of its weights: format, bits, whether they are symmetric, inputs of
    a group, and sides of a block."""
    where = f"config_groups.{name}"
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict):
        raise method.setting(where, group, "must have settings for weights")
    stored = group.get("format") or config.get("format")
    if stored not in _FORMATS:
        raise method.setting("format", stored, f"supported: {', '.join(_FORMATS)}")
    bits: Any = weights.get("num_bits")
    kind, strategy = weights.get("type", "int"), weights.get("strategy")
    if kind not in ("int", "float") or bits not in ((8,) if kind == "float" else (4, 8)):
        raise method.setting(
            f"{where}.weights", f"{bits} bits of {kind}", "supported: 4 or 8 bits of int, 8 of float"
        )
    size = weights.get("group_size") if strategy == "group" else 0
    if not isinstance(size, int):
        raise method.setting(f"{where}.weights.group_size", size, "must be an integer")
    block = weights.get("block_structure") if strategy == "block" else None
    return stored, bits, bool(weights.get("symmetric", True)), max(size, 0), block
