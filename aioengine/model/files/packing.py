"""Formats in which quantized checkpoints store a weight, and the bytes that each takes. No torch here."""

from __future__ import annotations

import msgspec

_BLOCKS = {
    "q4_0": (32, 18),
    "q4_1": (32, 20),
    "q5_0": (32, 22),
    "q5_1": (32, 24),
    "q8_0": (32, 34),
    "q2_k": (256, 84),
    "q3_k": (256, 110),
    "q4_k": (256, 144),
    "q5_k": (256, 176),
    "q6_k": (256, 210),
    "int4": (2, 1),
    "int8": (1, 1),
    "fp8": (1, 1),
    "mxfp4": (2, 1),
}
"""Inputs of a block and its bytes, by format: those of GGUF files with their scales, the others without."""

_SCALE_BYTES, _EXPONENT_BYTES, _ZERO_BYTES, _GROUP_OF_BYTES = 4, 1, 2, 4
GGUF_PACKINGS = tuple(name for name in _BLOCKS if name.startswith("q"))


class Packing(msgspec.Struct, frozen=True, kw_only=True):
    """A weight [n, k] as :class:`aioengine.kernels.blocks.BlockWeight` has it."""

    format: str
    """Name of a format in :mod:`aioengine.kernels.portable.dequantize`."""
    group: int = 0
    """Inputs that share a scale; 0: all of a row."""
    zeros: bool = False
    """Whether each group has a zero point of its own; else it is ``middle``."""
    ordered: bool = False
    """Whether inputs that share a scale need not be neighbours."""
    middle: int = 0

    @property
    def grouped(self) -> bool:
        """Whether scales are kept beside the codes."""
        return self.format not in GGUF_PACKINGS

    @property
    def exponents(self) -> bool:
        """Whether scales are powers of two, kept as their exponents in a byte each."""
        return self.format == "mxfp4"

    def row_bytes(self, k: int) -> int:
        """Return the bytes of a row's blocks. ``k`` must be a whole number of blocks."""
        inputs, nbytes = _BLOCKS[self.format]
        return k // inputs * nbytes

    def groups(self, k: int) -> int:
        """Groups of a row."""
        return -(-k // (self.group or k))

    def nbytes(self, n: int, k: int) -> int:
        """Exactly what the weight takes in memory."""
        if not self.grouped:
            return n * self.row_bytes(k)
        each = (_EXPONENT_BYTES if self.exponents else _SCALE_BYTES) + self.zeros * _ZERO_BYTES
        return n * (self.row_bytes(k) + self.groups(k) * each) + self.ordered * _GROUP_OF_BYTES * k

    def divides(self, begin: int, end: int, k: int) -> bool:
        """Whether inputs ``begin..end-1`` of ``k`` are whole blocks and groups of their own."""
        if (begin, end) == (0, k):
            return True
        size = max(_BLOCKS[self.format][0], self.group)
        return not self.ordered and begin % size == 0 and end % size == 0


MXFP4 = Packing(format="mxfp4", group=32)


def of_gguf(type: str) -> Packing | None:
    """Return the packing of a tensor type of GGUF files ("Q4_K"); None: it is not kept as it is."""
    format = type.lower()
    return Packing(format=format) if format in GGUF_PACKINGS else MXFP4 if format == MXFP4.format else None
