"""ReplacingOps: adapters' versions that are prepared first and published later, in two steps."""

from __future__ import annotations

import os

from aioengine.adapters.resolvers.sources import checked_path
from aioengine.errors import AdapterNotFound
from aioengine.info import AdapterInfo
from aioengine.runtime.adapters import AdapterOps
from aioengine.runtime.stats import adapter_info


class ReplacingOps(AdapterOps):
    """Operations that replace an adapter in two steps, for those who change several engines, or several
    adapters, all or none."""

    async def prepare_adapter(
        self, name: str, path: str | os.PathLike[str] | None = None, *, read: bool = True
    ) -> AdapterInfo:
        """Make the next version of an adapter ready for :meth:`commit_adapter`, which may be at the same time
        as that of other engines. With ``read=False`` it is read when a request first needs it."""
        self._check_lora()
        source = None if path is None else checked_path(name, path)
        async with self._loading(name) as known:
            self.discard_adapter(name)
            entry = await self._new_version(known, source)
            entry.held = True
            if read:
                await self._read(entry, known, pin=False)
            known.prepared = entry
        return adapter_info(entry)

    def commit_adapter(self, name: str) -> AdapterInfo:
        """Let new requests use the prepared version. Raises AdapterNotFound if there is none."""
        self._check_lora()
        known = self._table.of(name)
        entry = known.take_prepared()
        if entry is None:
            raise AdapterNotFound("no version of it was prepared; call prepare_adapter first", name=name)
        known.replace(entry, self._loop.now())
        self._loop.wake()
        return self._info(name)

    def discard_adapter(self, name: str) -> None:
        """Drop the prepared version, if there is one."""
        self._check_lora()
        known = self._table.of(name)
        entry = known.take_prepared()
        if entry is not None:
            known.retire(entry, self._loop.now())
            self._loop.wake()

    def expect_adapter(self, name: str, digest: str) -> None:
        """Accept only this content (``AdapterInfo.digest``) under a known name, until it is replaced or
        unloaded: if its files differ later, its requests fail with AdapterChanged. Raises AdapterNotFound."""
        self._check_lora()
        self._names.find(name)
        self._table.of(name).expect(digest)
