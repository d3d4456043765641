"""AWQ (Lin et al., 2023, arXiv:2306.00978), as AutoAWQ writes it in the version "gemm".

``qweight`` [k, n / 8] has eight codes of 4 bits along the outputs in each int32, and so has ``qzeros``
[groups, n / 8] the zero points; ``scales`` [groups, n].
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

_PLACE_OF = [0, 4, 1, 5, 2, 6, 3, 7]
"""The place in an int32 where each of eight outputs has its code."""


def awq(path: Path, config: Mapping[str, Any]) -> scheme.BlocksOf:
    """Return the way of "awq"."""
    method = scheme.Method(path, "awq")
    bits = config.get("bits", config.get("w_bit"))
    if bits != 4:
        raise method.setting("bits", bits, "only 4 is supported")
    version = str(config.get("version", "gemm")).lower()
    if version != "gemm":
        raise method.setting("version", version, "only 'gemm' is supported; use a checkpoint of that version")
    group = scheme.integer(config, "group_size" if "group_size" in config else "q_group_size", method, -1)
    zeros = bool(config.get("zero_point", True))
    packing = Packing(format="int4", group=0 if group == -1 else group, zeros=zeros, middle=8)

    def blocks_of(module: str, stored: Mapping[str, Stored]) -> StoredBlocks | None:
        if "qweight" not in stored:
            return None
        k, words = method.matrix(f"{module}.qweight", stored["qweight"])
        groups, n = packing.groups(k), words * 8
        expected: scheme.Expected = {
            "qweight": ((k, words), ("I32",)),
            "scales": ((groups, n), scheme.FLOATS),
        }
        if zeros:
            expected["qzeros"] = ((groups, words), ("I32",))

        def read(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            def unpacked(rows: Tensor) -> Tensor:
                """Return the codes of all outputs, in their order: [rows, n / 8] -> [n, rows]."""
                every = scheme.unpack_int32(rows, 4).view(len(rows), -1, 8)
                return every[:, :, _PLACE_OF].flatten(1).T.contiguous()

            codes = unpacked(tensors["qweight"])
            found = {"data": codes[:, 0::2] | codes[:, 1::2] << 4, "scale": tensors["scales"].T.float()}
            return found | ({"zero": unpacked(tensors["qzeros"]).short()} if zeros else {})

        return method.blocks(module, stored, (n, k), packing, expected, read)

    return blocks_of
