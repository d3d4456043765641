"""Prepared versions of a replica: each belongs to one door's change, and no other change uses or drops it."""

from __future__ import annotations

from aioengine.engine import AsyncEngine
from aioengine.errors import AdapterLoadError
from aioengine.info import AdapterInfo


class PreparedVersions:
    """Versions that the engine has prepared, at most one for each adapter. ``change`` is a change's name
    among those of all doors; the last one that has begun is the one that may go on."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._changes: dict[str, str] = {}
        """By adapter: the change that prepares a version, or has prepared it."""

    async def prepare(
        self, name: str, change: str, path: str | None = None, read: bool = True
    ) -> AdapterInfo:
        """Prepare a version. Nothing of it stays if the change ends meanwhile."""
        self._changes[name] = change
        try:
            info = await self._engine.prepare_adapter(name, path, read=read)
            if self._changes.get(name) != change:
                self._engine.discard_adapter(name)
                raise _ended(name)
            return info
        except BaseException:
            self._end(name, change)
            raise

    async def commit(self, name: str, change: str) -> AdapterInfo:
        """Let new requests use what the change has prepared."""
        if not self._end(name, change):
            raise _ended(name)
        return self._engine.commit_adapter(name)

    async def discard(self, name: str, change: str) -> None:
        """End the change: drop what it has prepared, or prepares."""
        if self._end(name, change):
            self._engine.discard_adapter(name)

    def _end(self, name: str, change: str) -> bool:
        """Return whether the change had not ended."""
        if self._changes.get(name) != change:
            return False
        del self._changes[name]
        return True


def _ended(name: str) -> AdapterLoadError:
    why = "the door that changes it has given that up, or another one changes it; repeat the change"
    return AdapterLoadError(why, name=name, transient=True)
