"""The operations of a model step: one signature, several backends.

``from aioengine.kernels import AttentionPlan, LoRABatch, get_backend``
"""

from aioengine.kernels.backend import Backend, HeadNorms, LayerCache, Norm, Rotation, Scores
from aioengine.kernels.dispatch import available_backends, get_backend
from aioengine.kernels.plan.attention import AttentionPlan, Span
from aioengine.kernels.plan.experts import ExpertPlan
from aioengine.kernels.plan.lora import LoRABatch, Segment
from aioengine.kernels.slots import LoRAPool, SlotMemory
from aioengine.kernels.weight import PlainWeight, Weight

__all__ = [
    "AttentionPlan",
    "Backend",
    "ExpertPlan",
    "HeadNorms",
    "LayerCache",
    "LoRABatch",
    "LoRAPool",
    "Norm",
    "PlainWeight",
    "Rotation",
    "Scores",
    "Segment",
    "SlotMemory",
    "Span",
    "Weight",
    "available_backends",
    "get_backend",
]
