"""The operations of a model step: one signature, several backends.

``from aioengine.kernels import AttentionPlan, LoRABatch, get_backend``
"""

from aioengine.kernels.backend import Backend as Backend
from aioengine.kernels.backend import HeadNorms as HeadNorms
from aioengine.kernels.backend import LayerCache as LayerCache
from aioengine.kernels.backend import Norm as Norm
from aioengine.kernels.backend import Rotation as Rotation
from aioengine.kernels.backend import Scores as Scores
from aioengine.kernels.dispatch import available_backends as available_backends
from aioengine.kernels.dispatch import get_backend as get_backend
from aioengine.kernels.plan.attention import AttentionPlan as AttentionPlan
from aioengine.kernels.plan.attention import Span as Span
from aioengine.kernels.plan.experts import ExpertPlan as ExpertPlan
from aioengine.kernels.plan.lora import LoRABatch as LoRABatch
from aioengine.kernels.plan.lora import Segment as Segment
from aioengine.kernels.slots import LoRAPool as LoRAPool
from aioengine.kernels.slots import SlotMemory as SlotMemory
from aioengine.kernels.weight import PlainWeight as PlainWeight
from aioengine.kernels.weight import Weight as Weight
