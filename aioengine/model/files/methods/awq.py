"""AWQ (Lin et al., 2023, arXiv:2306.00978), as AutoAWQ writes it in the version "gemm".

``qweight`` [k, n / 8] has eight codes of 4 bits along the outputs in each int32, and so has ``qzeros``
[groups, n / 8] the zero points; ``scales`` [groups, n].
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aioengine.model.files.methods.scheme import FLOATS, Expected, Header, Layout, Wrong, check_group, integer
from aioengine.model.files.packing import Packing

if TYPE_CHECKING:
    from torch import Tensor

_OUTPUT_OF = (0, 2, 4, 6, 1, 3, 5, 7)
"""The output, of eight, whose code is at each place of an int32."""


class AWQ:
    """The scheme "awq"."""

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        self._wrong = wrong = Wrong(path, "awq")
        bits = config.get("bits", config.get("w_bit"))
        if bits != 4:
            raise wrong.setting("bits", bits, "only 4 is supported")
        version = str(config.get("version", "gemm")).lower()
        if version != "gemm":
            raise wrong.setting(
                "version", version, "only 'gemm' is supported; use a checkpoint of that version"
            )
        group = integer(config, "group_size" if "group_size" in config else "q_group_size", wrong, -1)
        self._group = 0 if group == -1 else group
        self._zeros = bool(config.get("zero_point", True))

    def layout(self, module: str, headers: Mapping[str, Header]) -> Layout | None:
        if "qweight" not in headers:
            return None
        name = f"{module}.qweight"
        k, words = self._wrong.matrix(name, headers["qweight"])
        check_group(self._group, k, name, self._wrong)
        packing = Packing(format="int4", group=self._group, zeros=self._zeros, middle=8)
        groups = packing.groups(k)
        expected: Expected = {"qweight": ((k, words), ("I32",)), "scales": ((groups, words * 8), FLOATS)}
        if self._zeros:
            expected["qzeros"] = ((groups, words), ("I32",))
        self._wrong.check(module, headers, expected)
        return Layout(words * 8, k, packing)

    def fields(self, module: str, layout: Layout, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        import torch

        words = tensors["qweight"].T.contiguous()  # [n / 8, k]
        data = torch.empty(layout.n // 8, 8, layout.k // 2, dtype=torch.uint8)
        # The codes of two inputs become a byte: four outputs at once.
        first, second, low = words[:, 0::2], words[:, 1::2], 0x0F0F0F0F
        pairs = (first & low) | (second & low) << 4, (first >> 4 & low) | (second & ~low)
        for place, output in enumerate(_OUTPUT_OF):
            data[:, output] = pairs[place % 2].view(torch.uint8)[:, place // 2 :: 4]
        found = {"data": data.view(layout.n, -1), "scale": tensors["scales"].T.float()}
        if self._zeros:
            zeros = tensors["qzeros"]
            zero = torch.empty(*zeros.shape, 8, dtype=torch.int16)
            for place, output in enumerate(_OUTPUT_OF):
                zero[:, :, output] = ((zeros >> (4 * place)) & 15).short()
            found["zero"] = zero.flatten(1).T
        return found
