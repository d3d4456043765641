"""aioengine: serve many LoRA adapters over one base model, from an asyncio application.

A name is imported when it is first used (PEP 562), so that ``import aioengine`` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aioengine.adapters.resolvers.base import AdapterResolver, ChainResolver
    from aioengine.adapters.resolvers.filesystem import FilesystemResolver
    from aioengine.adapters.resolvers.fsspec import FsspecResolver
    from aioengine.adapters.resolvers.hub import HubResolver
    from aioengine.config import EngineConfig, LoRAConfig
    from aioengine.engine import AsyncEngine
    from aioengine.info import AdapterInfo, EngineInfo, EngineStats, SlotInfo
    from aioengine.runtime.output import RequestOutput
from aioengine.request import CachePin, SamplingParams, TokenLogprob

__version__ = "0.1.0"

__all__ = [
    "AdapterInfo",
    "AdapterResolver",
    "AsyncEngine",
    "CachePin",
    "ChainResolver",
    "EngineConfig",
    "EngineInfo",
    "EngineStats",
    "FilesystemResolver",
    "FsspecResolver",
    "HubResolver",
    "LoRAConfig",
    "RequestOutput",
    "SamplingParams",
    "SlotInfo",
    "TokenLogprob",
]

_HOMES = {
    "AdapterInfo": ".info",
    "AdapterResolver": ".adapters.resolvers.base",
    "AsyncEngine": ".engine",
    "CachePin": ".request",
    "ChainResolver": ".adapters.resolvers.base",
    "EngineConfig": ".config",
    "EngineInfo": ".info",
    "EngineStats": ".info",
    "FilesystemResolver": ".adapters.resolvers.filesystem",
    "FsspecResolver": ".adapters.resolvers.fsspec",
    "HubResolver": ".adapters.resolvers.hub",
    "LoRAConfig": ".config",
    "RequestOutput": ".runtime.output",
    "SamplingParams": ".request",
    "SlotInfo": ".info",
    "TokenLogprob": ".request",
}
"""Name -> the module that defines it, as in the imports above."""


def __getattr__(name: str) -> object:
    if name in ("errors", "events"):
        return importlib.import_module(f".{name}", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
