"""GPTQ (Frantar et al., 2022, arXiv:2210.17323), as AutoGPTQ and GPTQModel write it.

``qweight`` [k / 8, n] has eight codes of 4 bits along the inputs in each int32, the lowest first; ``qzeros``
[groups, n / 8] the zero points along the outputs, less one in the first version of the format; ``scales``
[groups, n]; ``g_idx`` [k] the group of each input, which need not be neighbours ("act-order", ``desc_act``).
With 8 bits there are four to an int32.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aioengine.model.files.methods import scheme
from aioengine.model.files.packing import Packing
from aioengine.model.files.stored import Stored, StoredBlocks

if TYPE_CHECKING:
    from torch import Tensor

_FORMATS = {"gptq": 1, "gptq_v2": 0}
"""``checkpoint_format`` -> what is to be added to the zero points."""


def gptq(path: Path, config: Mapping[str, Any]) -> scheme.BlocksOf:
    """Return the way of "gptq"."""
    method = scheme.Method(path, "gptq")
    bits, group = scheme.integer(config, "bits", method), scheme.integer(config, "group_size", method, -1)
    if bits not in (4, 8):
        raise method.setting("bits", bits, "4 and 8 are supported; use a checkpoint with one of them")
    version = config.get("checkpoint_format", "gptq")
    if version not in _FORMATS:
        raise method.setting("checkpoint_format", version, f"supported: {', '.join(_FORMATS)}")
    dynamic = config.get("dynamic") or {}
    # Patterns with a minus are of modules that are not quantized, which their tensors show.
    if not isinstance(dynamic, dict) or any(not name.startswith("-:") for name in dynamic):
        raise method.setting("dynamic", "{...}", "settings that differ between modules are not supported")
    packing = Packing(
        format="int4" if bits == 4 else "int8",
        group=0 if group == -1 else group,
        zeros=True,
        ordered=bool(config.get("desc_act", False)),
    )

    def blocks_of(module: str, stored: Mapping[str, Stored]) -> StoredBlocks | None:
        if "qweight" not in stored:
            return None
        each = 32 // bits
        words, n = method.matrix(f"{module}.qweight", stored["qweight"])
        k = words * each
        expected: scheme.Expected = {
            "qweight": ((words, n), ("I32",)),
            "qzeros": ((packing.groups(k), n // each), ("I32",)),
            "scales": ((packing.groups(k), n), scheme.FLOATS),
        }
        if packing.ordered or "g_idx" in stored:
            expected["g_idx"] = ((k,), ("I32",))

        def read(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            import torch

            zero = scheme.unpack_int32(tensors["qzeros"], bits).short() + _FORMATS[version]
            data = tensors["qweight"].T.contiguous().view(torch.uint8)
            if bits == 8:  # kept as signed bytes
                data, zero = data ^ 128, zero - 128
            found = {"data": data, "scale": tensors["scales"].T.float(), "zero": zero.T}
            group_of, usual = tensors.get("g_idx"), torch.arange(k, dtype=torch.int32) // (packing.group or k)
            if packing.ordered:
                found["group_of"] = group_of = tensors["g_idx"]
                if not bool(((group_of >= 0) & (group_of < len(tensors["scales"]))).all()):
                    raise method.tensor(f"{module}.g_idx", "names groups that do not exist")
            elif group_of is not None and not torch.equal(group_of, usual):
                what = "has groups of inputs that are not neighbours, but desc_act is false"
                raise method.tensor(f"{module}.g_idx", what)
            return found

        return method.blocks(module, stored, (n, k), packing, expected, read)

    return blocks_of
