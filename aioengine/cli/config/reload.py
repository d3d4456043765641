"""SIGHUP: reading the configuration again, and applying what can be changed while requests run."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any, Protocol

from aioengine.cli.config.file import server_table
from aioengine.cli.flags import EngineFlags
from aioengine.config import EngineConfig
from aioengine.errors import AioEngineError

logger = logging.getLogger("aioengine.server")

RELOADABLE = ("max_waiting", "max_waiting_per_tenant", "max_waiting_per_adapter")


class Changeable(Protocol):
    """An engine, as far as it can be changed while it runs."""

    config: EngineConfig

    def change_limits(
        self,
        *,
        max_waiting: int | None,
        max_waiting_per_tenant: int | None,
        max_waiting_per_adapter: int | None,
    ) -> None: ...


class Reloader:
    """Compares what the file says now with what it said before.

    Either all that is reloadable is applied, or, if any of the file is wrong, nothing. The keys file is read
    again by itself, whenever it changes.
    """

    def __init__(self, flags: EngineFlags, default_max_waiting: int) -> None:
        self._flags = flags
        self._default_max_waiting = default_max_waiting
        self._server = self._server_table()

    async def reload(self, engine: Changeable) -> None:
        """Log what was changed, what would need a restart, and what is wrong."""
        try:
            config, server = await asyncio.to_thread(self._read)
        except AioEngineError as error:
            logger.error("the configuration stays as it was: %s", error)
            return
        before = engine.config
        changed = {name: getattr(config, name) for name in RELOADABLE}
        if changed["max_waiting"] is None:
            changed["max_waiting"] = self._default_max_waiting
        new = {name: value for name, value in changed.items() if value != getattr(before, name)}
        engine.change_limits(**changed)
        kept = [name for name in _differing(config, before) if name not in RELOADABLE]
        kept += [
            f"[server] {name}"
            for name in sorted(server.keys() | self._server.keys())
            if server.get(name) != self._server.get(name)
        ]
        shown = ", ".join(f"{name}={value}" for name, value in new.items()) or "nothing"
        logger.info("read the configuration again; changed: %s", shown)
        if kept:
            logger.warning("these are changed in the configuration and take a restart: %s", ", ".join(kept))

    def _read(self) -> tuple[EngineConfig, Mapping[str, Any]]:
        return self._flags.engine_config(), self._server_table()

    def _server_table(self) -> Mapping[str, Any]:
        return {} if self._flags.config is None else server_table(str(self._flags.config))


def _differing(one: EngineConfig, other: EngineConfig) -> list[str]:
    names = [name for name in one.__struct_fields__ if getattr(one, name) != getattr(other, name)]
    if "lora" in names and one.lora is not None and other.lora is not None:
        names.remove("lora")
        mine, theirs = one.lora, other.lora
        names += [f"lora.{n}" for n in mine.__struct_fields__ if getattr(mine, n) != getattr(theirs, n)]
    return names
