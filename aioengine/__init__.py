"""aioengine: serve many LoRA adapters over one base model, from an asyncio application.

A name is imported when it is first used (PEP 562), so that ``import aioengine`` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aioengine.adapters.resolvers.base import AdapterResolver as AdapterResolver
    from aioengine.adapters.resolvers.base import ChainResolver as ChainResolver
    from aioengine.adapters.resolvers.filesystem import FilesystemResolver as FilesystemResolver
    from aioengine.adapters.resolvers.fsspec import FsspecResolver as FsspecResolver
    from aioengine.adapters.resolvers.hub import HubResolver as HubResolver
    from aioengine.config import EngineConfig as EngineConfig
    from aioengine.config import LoRAConfig as LoRAConfig
    from aioengine.engine import AsyncEngine as AsyncEngine
    from aioengine.info import AdapterInfo as AdapterInfo
    from aioengine.info import EngineInfo as EngineInfo
    from aioengine.info import EngineStats as EngineStats
    from aioengine.info import SlotInfo as SlotInfo
    from aioengine.request import SamplingParams as SamplingParams
    from aioengine.request import TokenLogprob as TokenLogprob
    from aioengine.runtime.output import RequestOutput as RequestOutput

__version__ = "0.1.0"

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
__all__ = [name for names in _NAMES.values() for name in names]


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
