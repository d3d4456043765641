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

if TYPE_CHECKING:
    from torch import Tensor

_OUTPUT_OF = (0, 2, 4, 6, 1, 3, 5, 7)
"""The output, of eight, whose code is at each place of an int32."""


def awq(path: Path, config: Mapping[str, Any]) -> scheme.LayoutOf:
    """Return the way of "awq"."""
    wrong = scheme.CheckpointErrors(path, "awq")
    bits = config.get("bits", config.get("w_bit"))
    if bits != 4:
        raise wrong.setting("bits", bits, "only 4 is supported")
    version = str(config.get("version", "gemm")).lower()
    if version != "gemm":
        raise wrong.setting("version", version, "only 'gemm' is supported; use a checkpoint of that version")
    group = scheme.integer(config, "group_size" if "group_size" in config else "q_group_size", wrong, -1)
    zeros = bool(config.get("zero_point", True))
    packing = Packing(format="int4", group=0 if group == -1 else group, zeros=zeros, middle=8)

    def layout(module: str, headers: Mapping[str, scheme.Header]) -> scheme.Layout | None:
        if "qweight" not in headers:
            return None
        k, words = wrong.matrix(f"{module}.qweight", headers["qweight"])
        groups, n = packing.groups(k), words * 8
        expected: scheme.Expected = {
            "qweight": ((k, words), ("I32",)),
            "scales": ((groups, n), scheme.FLOATS),
        }
        if zeros:
            expected["qzeros"] = ((groups, words), ("I32",))

        def read(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            import torch

            data = torch.empty(words, 8, k // 2, dtype=torch.uint8)
            zero = torch.empty(groups, words, 8, dtype=torch.int16)
            # The codes of two inputs become a byte: four outputs at once.
            codes = tensors["qweight"].T.contiguous()  # [n / 8, k]
            first, second, low = codes[:, 0::2], codes[:, 1::2], 0x0F0F0F0F
            pairs = (first & low) | (second & low) << 4, (first >> 4 & low) | (second & ~low)
            for place, output in enumerate(_OUTPUT_OF):
                data[:, output] = pairs[place % 2].view(torch.uint8)[:, place // 2 :: 4]
                if zeros:
                    zero[:, :, output] = ((tensors["qzeros"] >> (4 * place)) & 15).short()
            found = {"data": data.view(n, -1), "scale": tensors["scales"].T.float()}
            return found | ({"zero": zero.flatten(1).T} if zeros else {})

        return scheme.Layout(n, k, packing, expected, read)

    return layout
