"""aioengine: serve many LoRA adapters over one base model, from an asyncio application."""

from aioengine.config import EngineConfig, LoRAConfig
from aioengine.engine import AsyncEngine
from aioengine.info import AdapterInfo, EngineStats, SlotInfo
from aioengine.request import RequestOutput, SamplingParams, TokenLogprob

__version__ = "0.1.0"

__all__ = [
    "AdapterInfo",
    "AsyncEngine",
    "EngineConfig",
    "EngineStats",
    "LoRAConfig",
    "RequestOutput",
    "SamplingParams",
    "SlotInfo",
    "TokenLogprob",
]
