"""The backend ``triton``: the operations of a layer except its linears as Triton kernels, for GPUs.

The linears are cuBLAS's, through torch, except those of quantized checkpoints.
"""

from aioengine.kernels.portable.plain import argmax as argmax
from aioengine.kernels.portable.plain import soft_cap_ as soft_cap_
from aioengine.kernels.triton.attention import paged_attention as paged_attention
from aioengine.kernels.triton.blocks import linear as linear
from aioengine.kernels.triton.experts import expert_linear as expert_linear
from aioengine.kernels.triton.layer import add_rms_norm as add_rms_norm
from aioengine.kernels.triton.layer import clamped_swiglu as clamped_swiglu
from aioengine.kernels.triton.layer import gelu_and_mul as gelu_and_mul
from aioengine.kernels.triton.layer import rope_store as rope_store
from aioengine.kernels.triton.layer import silu_and_mul as silu_and_mul
from aioengine.kernels.triton.lora import lora_affine as lora_affine
from aioengine.kernels.triton.lora import lora_embed as lora_embed
from aioengine.kernels.triton.lora import lora_expand as lora_expand
from aioengine.kernels.triton.lora import lora_shrink as lora_shrink

name = "triton"
capturable = True
