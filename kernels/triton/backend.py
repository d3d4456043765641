"""The backend ``triton``: the operations of a layer except its linears as Triton kernels, for GPUs.

The linears are cuBLAS's, through torch.
"""

from aioengine.kernels.portable.plain import linear, soft_cap_
from aioengine.kernels.triton.attention import paged_attention
from aioengine.kernels.triton.experts import expert_linear
from aioengine.kernels.triton.layer import (
    add_rms_norm,
    clamped_swiglu,
    gelu_and_mul,
    rope_store,
    silu_and_mul,
)
from aioengine.kernels.triton.lora import lora_affine, lora_embed, lora_expand, lora_shrink

name = "triton"
capturable = True

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
