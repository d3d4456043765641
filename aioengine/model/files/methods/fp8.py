"""Float8 (e4m3) weights with a scale for the whole weight, for each output, or for blocks of both sides.

``weight`` [n, k] float8, and ``weight_scale`` [], [1], [n] or [n, 1], or ``weight_scale_inv``
[ceil(n / 128), ceil(k / 128)] as DeepSeek-V3 has it, by which weights are multiplied despite its name.
The checkpoint's scales of activations are not used. These stay in the compute dtype, which is more exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aioengine.model.files.methods import scheme
from aioengine.model.files.packing import Packing
from aioengine.model.files.stored import Stored, StoredBlocks

if TYPE_CHECKING:
    from torch import Tensor

_SCALES = ("weight_scale", "weight_scale_inv")
_SCALE_TYPES = (*scheme.FLOATS, "F8_E8M0")
_NAN = 127


def fp8(path: Path, config: Mapping[str, Any]) -> scheme.BlocksOf:
    """Return the way of "fp8" and "fbgemm_fp8", and of float8 weights of compressed-tensors."""
    method = scheme.Method(path, config["quant_method"])
    block = config.get("weight_block_size")
    pair = isinstance(block, Sequence) and len(block) == 2
    if block is not None and not (pair and all(isinstance(x, int) and x > 0 for x in block)):
        raise method.setting("weight_block_size", block, "must be two numbers above zero")
    if (kind := config.get("fmt", "e4m3")) != "e4m3":
        raise method.setting("fmt", kind, "only e4m3 is supported")

    def blocks_of(module: str, stored: Mapping[str, Stored]) -> StoredBlocks | None:
        weight = stored.get("weight")
        if weight is None or not weight.dtype.startswith("F8"):
            return None
        if weight.dtype != "F8_E4M3":
            raise method.tensor(f"{module}.weight", f"{weight.dtype} is not supported; F8_E4M3 is")
        n, k = method.matrix(f"{module}.weight", weight)
        kind = next((kind for kind in _SCALES if kind in stored), None)
        if kind is None:
            raise method.tensor(f"{module}.weight_scale", "is missing")
        found, rows, group = stored[kind], 0, 0
        expected: scheme.Expected = {}
        if found.dtype not in _SCALE_TYPES:
            raise method.tensor(f"{module}.{kind}", f"{found.dtype} is not supported for scales")
        if found.shape not in ((), (1,), (n,), (n, 1), (1, 1)):
            if block is None:
                raise method.tensor(
                    f"{module}.{kind}",
                    f"has shape {found.shape}; expected a scale, or one for each of {n} outputs",
                )
            rows, group = block
            expected[kind] = ((-(-n // rows), -(-k // group)), _SCALE_TYPES)

        def read(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            import torch

            data, scale = tensors["weight"].view(torch.uint8), tensors[kind].float()
            if bool((data & _NAN == _NAN).any()):
                raise method.tensor(f"{module}.weight", "is not finite")
            whole = scale.repeat_interleave(rows, 0)[:n] if rows else scale.reshape(-1, 1).expand(n, 1)
            return {"data": data, "scale": whole}

        packing = Packing(format="fp8", group=min(group, k))
        return method.blocks(module, stored, (n, k), packing, expected, read)

    return blocks_of
