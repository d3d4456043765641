"""The place below which adapters may be loaded from over HTTP."""

from __future__ import annotations

import os
from pathlib import Path

from aioengine import FilesystemResolver
from aioengine.adapters.resolvers.sources import source_below
from aioengine.config import LoRAConfig


class AdapterRoot:
    """A folder, or a URL."""

    def __init__(self, root: str, timeout: float | None) -> None:
        self.timeout = timeout
        self._root = root
        self._folders = None if source_below(root, "", "any") is not None else FilesystemResolver(root)

    def below(self, name: str, path: str) -> str:
        """Return the path relative to the root. Raises AdapterNotFound if it is not below a URL; ``find``
        says whether it is below a folder."""
        if self._folders is None:
            return str(source_below(self._root, name, path)).removeprefix(self._root.rstrip("/") + "/")
        return _relative(path, self._folders.root)

    async def find(self, name: str, below: str) -> str:
        """Return the folder or the URL. Raises AdapterNotFound if it is not below the root."""
        if self._folders is None:
            return str(source_below(self._root, name, below))
        return str(await self._folders.resolve(below))


def adapter_root(lora: LoRAConfig | None) -> AdapterRoot | None:
    """Return the place below which adapters may be loaded from; None: nowhere. Raises ConfigError."""
    if lora is None or lora.adapter_root is None:
        return None
    return AdapterRoot(lora.adapter_root, lora.load_timeout)


def _relative(path: str, root: Path) -> str:
    """Return the path relative to ``root``. A path outside gets ".." parts, which the resolver refuses."""
    return os.path.relpath(path, root) if os.path.isabs(path) else path.removeprefix("./").rstrip("/")
