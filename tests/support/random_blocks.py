"""Random weights in the blocks of quantized checkpoints."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf.constants import GGML_QUANT_SIZES

from aioengine.kernels.blocks import BlockWeight

BITS = {"int4": 4, "int8": 8, "fp8": 8, "mxfp4": 4}


SCALES_AT = {"q2_k": (80, 82), "q3_k": (108,), "q6_k": (208,), "q4_0": (0,), "q5_0": (0,), "q8_0": (0,)}
"""The bytes at which float16 scales and minima begin; else 0 and 2."""


def random_blocks(
    format: str, n: int, k: int, seed: int = 0, *, dtype: torch.dtype = torch.float32
) -> BlockWeight:
    """Any bytes, with finite scales that do not differ too much."""
    rng = np.random.default_rng(seed)
    size, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[format.upper()]]
    raw = rng.integers(0, 256, (n, k // size, nbytes), dtype=np.uint8)
    for where in SCALES_AT.get(format, (0, 2)):
        scale = rng.uniform(-0.02, 0.02, (n, k // size, 1)).astype(np.float16)
        raw[:, :, where : where + 2] = scale.view(np.uint8)
    return BlockWeight(format, torch.from_numpy(raw.reshape(n, -1)), k, dtype)


def random_codes(
    format: str,
    n: int,
    k: int,
    seed: int = 0,
    *,
    group: int = 32,
    zeros: bool = True,
    ordered: bool = False,
    dtype: torch.dtype = torch.float32,
) -> BlockWeight:
    """Any codes. Those of float8 and float4 have no zero points, and the latter scales of a byte."""
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (n, k * BITS[format] // 8), dtype=np.uint8)
    if format == "fp8":
        data[data & 127 == 127] = 0  # no NaN
    groups = -(-k // group)
    zero = torch.from_numpy(rng.integers(0, 17, (n, groups)).astype(np.int16))
    scale = torch.from_numpy(rng.uniform(0.001, 0.02, (n, groups)).astype(np.float32))
    if format == "mxfp4":
        scale = torch.from_numpy(rng.integers(118, 122, (n, groups), dtype=np.uint8))
    return BlockWeight(
        format,
        torch.from_numpy(data),
        k,
        dtype,
        scale=scale,
        zero=zero if zeros and format in ("int4", "int8") else None,
        group_of=torch.from_numpy(rng.permutation(k).astype(np.int32) // group) if ordered else None,
        group=group,
        middle=8 if format == "int4" else 0,
    )


def copy(weight: BlockWeight, device: str = "cpu") -> BlockWeight:
    tensors = {name: tensor.to(device, copy=True) for name, tensor in weight.tensors().items()}
    return dataclasses.replace(weight, **tensors)
