"""LoRA operations over tokens grouped by adapter: one signature, several backends.

``from aioengine.kernels import LoRABatch, get_backend``
"""

from aioengine.kernels.batch import LoRABatch, Segment
from aioengine.kernels.dispatch import LoRABackend, available_backends, get_backend

__all__ = ["LoRABackend", "LoRABatch", "Segment", "available_backends", "get_backend"]
