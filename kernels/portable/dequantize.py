"""Block formats of quantized checkpoints, expanded to float32 with torch on any device.

It is the reference for :mod:`aioengine.kernels.cpu.blocks`, and runs where there is no compiled library. The
formats that begin with "q" are llama.cpp's, byte for byte as GGUF files have them
(https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h); their results equal those of the package
``gguf`` bit for bit. The others are codes alone; their scales are stored separately.
"""

from __future__ import annotations

import torch
from torch import Tensor

LAYOUTS = {
    "q4_0": (32, 1, 4, 0),
    "q4_1": (32, 2, 4, 0),
    "q5_0": (32, 1, 5, 0),
    "q5_1": (32, 2, 5, 0),
    "q8_0": (32, 1, 8, 0),
    "q2_k": (256, 0, 20, 2),
    "q3_k": (256, 0, 27, 1),
    "q4_k": (256, 2, 35, 0),
    "q5_k": (256, 2, 43, 0),
    "q6_k": (256, 0, 52, 1),
    "int4": (8, 0, 1, 0),
    "int8": (4, 0, 1, 0),
    "fp8": (4, 0, 1, 0),
    "mxfp4": (8, 0, 1, 0),
}
"""Inputs of a block, and its bytes: float16 values, words of four bytes, float16 values. The formats are in
the order of the compiled library."""
GGUF_FORMATS = tuple(name for name in LAYOUTS if name.startswith("q"))
"""Formats of blocks that contain their scales."""
GROUPED_FORMATS = tuple(name for name in LAYOUTS if name not in GGUF_FORMATS)
"""Formats of codes [n, k] with separate scales for groups of inputs: unsigned 4 bits, the lower ones first;
int8; float8 (e4m3fn); and float4 (e2m1), the lower four bits of a byte first, whose scales are powers of two
(Rouhani et al., 2023, arXiv:2310.10537)."""

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Values of float4 without a sign, which is the highest bit: two bits of exponent, one of mantissa."""


def dequantize(format: str, data: Tensor) -> Tensor:
    """Blocks ``data`` [n, row bytes] (uint8) of one of :data:`GGUF_FORMATS`, as float32 [n, k]."""
    size, first, words, last = LAYOUTS[format]
    blocks = data.reshape(-1, 2 * first + 4 * words + 2 * last)
    return _EXPAND[format](blocks).reshape(len(data), -1, size).flatten(1)


def codes(format: str, data: Tensor) -> Tensor:
    """Codes ``data`` [n, row bytes] (uint8) of one of :data:`GROUPED_FORMATS`, as float32 [n, k]."""
    if format in ("int4", "mxfp4"):
        nibbles = torch.stack((data & 15, data >> 4), -1).flatten(1)
        if format == "int4":
            return nibbles.float()
        table = torch.tensor([*_E2M1, *(-value for value in _E2M1)], device=data.device)
        return table[nibbles.int()]
    values: Tensor = data.view(torch.int8 if format == "int8" else torch.float8_e4m3fn)
    return values.float()


def scales(stored: Tensor) -> Tensor:
    """Scales [n, groups] as float32: they are so already, or stored as the exponents of powers of two and 127
    (uint8), of which 255 is none."""
    if stored.dtype != torch.uint8:
        return stored
    return (stored.int() << 23).clamp(min=1 << 22).view(torch.float32)  # the least is a subnormal number


def split_mxfp4(data: Tensor) -> dict[str, Tensor]:
    """Codes and exponents of llama.cpp's blocks of MXFP4, ``data`` [n, row bytes], by their names in a
    :class:`aioengine.kernels.blocks.BlockWeight`.

    A block is an exponent and 16 bytes, whose lower four bits are the first half of its codes.
    """
    blocks = data.view(len(data), -1, 17)
    found = torch.cat((blocks[..., 1:] & 15, blocks[..., 1:] >> 4), -1).flatten(1)
    return {"data": found[:, ::2] | found[:, 1::2] << 4, "scale": blocks[..., 0]}


def _half(block: Tensor, at: int) -> Tensor:
    """Return a float16 at a byte of each block: [blocks, 1]."""
    return block[:, at : at + 2].contiguous().view(torch.float16).float()


def _bits(data: Tensor, count: int, rows: int) -> Tensor:
    """Parts of ``count`` bits, the lowest first: each run of ``rows`` bytes gives 8 / count runs of ``rows``
    values: [blocks, bytes] -> [blocks, bytes * 8 / count]."""
    shift = torch.arange(0, 8, count, dtype=torch.uint8, device=data.device)[:, None]
    runs = data.reshape(len(data), -1, 1, rows)
    return ((runs >> shift) & ((1 << count) - 1)).flatten(1)


def _legacy(block: Tensor, *, high: bool, minimum: bool) -> Tensor:
    """32 values of 4 or 5 bits (``high``), scaled, around zero or from a minimum on."""
    at = 4 if minimum else 2
    q = _bits(block[:, at + 4 * high :], 4, 16).float()
    if high:
        shift = torch.arange(8, dtype=torch.uint8, device=block.device)
        fifth = (block[:, at : at + 4, None] >> shift) & 1
        q += 16 * fifth.flatten(1)
    scale = _half(block, 0)
    return q * scale + _half(block, 2) if minimum else (q - (16 if high else 8)) * scale


def _q8_0(block: Tensor) -> Tensor:
    return block[:, 2:].contiguous().view(torch.int8).float() * _half(block, 0)


def _by_group(values: Tensor, scale: Tensor, minimum: Tensor | None = None) -> Tensor:
    """Values [blocks, 256] times scales [blocks, groups], less minima."""
    grouped = values.float().view(*scale.shape, -1) * scale[..., None]
    return (grouped if minimum is None else grouped - minimum[..., None]).flatten(1)


def _q2_k(block: Tensor) -> Tensor:
    scales, d, low = block[:, :16], _half(block, 80), _half(block, 82)
    return _by_group(_bits(block[:, 16:80], 2, 32), d * (scales & 15), low * (scales >> 4))


def _q3_k(block: Tensor) -> Tensor:
    third, packed = _bits(block[:, :32], 1, 32), block[:, 96:108]
    scales = _bits(packed[:, :8], 4, 8) | (_bits(packed[:, 8:], 2, 4) << 4)
    values = (_bits(block[:, 32:96], 2, 32) + 4 * third).float() - 4
    return _by_group(values, _half(block, 108) * (scales.float() - 32))


def _scales_and_minima(block: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eight scales and minima of q4_k and q5_k, of six bits each in twelve bytes."""
    a, b, c = block[:, 4:8], block[:, 8:12], block[:, 12:16]
    scale = torch.cat((a & 63, (c & 15) | ((a >> 2) & 48)), 1)
    minimum = torch.cat((b & 63, (c >> 4) | ((b >> 2) & 48)), 1)
    return _half(block, 0) * scale, _half(block, 2) * minimum


def _q4_k(block: Tensor) -> Tensor:
    return _by_group(_bits(block[:, 16:], 4, 32), *_scales_and_minima(block))


def _q5_k(block: Tensor) -> Tensor:
    values = _bits(block[:, 48:], 4, 32) | (_bits(block[:, 16:48], 1, 32) << 4)
    return _by_group(values, *_scales_and_minima(block))


def _q6_k(block: Tensor) -> Tensor:
    values = _bits(block[:, :128], 4, 64) | (_bits(block[:, 128:192], 2, 32) << 4)
    scales = block[:, 192:208].contiguous().view(torch.int8)
    return _by_group(values.float() - 32, _half(block, 208) * scales)


_EXPAND = {
    "q4_0": lambda block: _legacy(block, high=False, minimum=False),
    "q4_1": lambda block: _legacy(block, high=False, minimum=True),
    "q5_0": lambda block: _legacy(block, high=True, minimum=False),
    "q5_1": lambda block: _legacy(block, high=True, minimum=True),
    "q8_0": _q8_0,
    "q2_k": _q2_k,
    "q3_k": _q3_k,
    "q4_k": _q4_k,
    "q5_k": _q5_k,
    "q6_k": _q6_k,
}
