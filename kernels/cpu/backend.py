"""The backend ``cpu``: the compiled library, an operation at a time.

Plain torch does what the library does not cover: float16, LoRA on embeddings, head dimensions and block sizes
that are no multiples of 16. Whole steps are one call where a model allows for it: ``decoder.cpp``.
"""

from __future__ import annotations

from aioengine.kernels.cpu.layer import add_rms_norm as add_rms_norm
from aioengine.kernels.cpu.layer import argmax as argmax
from aioengine.kernels.cpu.layer import clamped_swiglu as clamped_swiglu
from aioengine.kernels.cpu.layer import expert_linear as expert_linear
from aioengine.kernels.cpu.layer import gelu_and_mul as gelu_and_mul
from aioengine.kernels.cpu.layer import paged_attention as paged_attention
from aioengine.kernels.cpu.layer import rope_store as rope_store
from aioengine.kernels.cpu.layer import silu_and_mul as silu_and_mul
from aioengine.kernels.cpu.layer import soft_cap_ as soft_cap_
from aioengine.kernels.cpu.lora import lora_affine as lora_affine
from aioengine.kernels.cpu.lora import lora_embed as lora_embed
from aioengine.kernels.cpu.lora import lora_expand as lora_expand
from aioengine.kernels.cpu.lora import lora_shrink as lora_shrink
from aioengine.kernels.portable.plain import linear as linear

name = "cpu"
capturable = False
