"""The backend ``cpu``: the compiled library, an operation at a time.

Plain torch does what the library does not cover: float16, LoRA on embeddings, head dimensions and block sizes
that are no multiples of 16. Whole steps are one call where a model allows for it: ``decoder.cpp``.
"""

from __future__ import annotations

from aioengine.kernels.cpu.experts import expert_linear
from aioengine.kernels.cpu.layer import (
    add_rms_norm,
    clamped_swiglu,
    gelu_and_mul,
    paged_attention,
    rope_store,
    silu_and_mul,
    soft_cap_,
)
from aioengine.kernels.cpu.lora import lora_affine, lora_embed, lora_expand, lora_shrink
from aioengine.kernels.portable.plain import linear

name = "cpu"
capturable = False

__all__ = [
    "add_rms_norm",
    "capturable",
    "clamped_swiglu",
    "expert_linear",
    "gelu_and_mul",
    "linear",
    "lora_affine",
    "lora_embed",
    "lora_expand",
    "lora_shrink",
    "name",
    "paged_attention",
    "rope_store",
    "silu_and_mul",
    "soft_cap_",
]
