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
    from aioengine.request import SamplingParams, TokenLogprob
    from aioengine.runtime.output import RequestOutput

__version__ = "0.1.0"

__all__ = [
    "AdapterInfo",
    "AdapterResolver",
    "AsyncEngine",
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

_NAMES = {
    ".adapters.resolvers.base": ("AdapterResolver", "ChainResolver"),
    ".adapters.resolvers.filesystem": ("FilesystemResolver",),
    ".adapters.resolvers.fsspec": ("FsspecResolver",),
    ".adapters.resolvers.hub": ("HubResolver",),
    ".config": ("EngineConfig", "LoRAConfig"),
    ".engine": ("AsyncEngine",),
    ".info": ("AdapterInfo", "EngineInfo", "EngineStats", "SlotInfo"),
    ".request": ("SamplingParams", "TokenLogprob"),
    ".runtime.output": ("RequestOutput",),
}
"""Module -> the names that it defines, as in the imports above."""


def __getattr__(name: str) -> object:
    if name in ("errors", "events"):
        return importlib.import_module(f".{name}", __name__)
    for module, names in _NAMES.items():
        if name in names:
            globals()[name] = value = getattr(importlib.import_module(module, __name__), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
