"""Flags of ``aioengine serve`` that make it a fleet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Group, Parameter

from aioengine.cli.common import given
from aioengine.cli.config.file import fleet_table
from aioengine.cli.help import FOLDED
from aioengine.config import EngineConfig
from aioengine.errors import ConfigError
from aioengine.fleet.config import FleetConfig

_SERVER = Group("Server", sort_key=5)
_IN_MORE = Parameter(group=Group(f"{FOLDED} fleet flags", sort_key=28))
ELSEWHERE = {
    "engine": "the top of the file",
    "adapters": "[adapters]",
    "otlp_endpoint": "[server]",
    "served_model_names": "[server], as served_model_name",
    "server": "[server]",
}
"""Fields of FleetConfig that a server has from other tables."""


@Parameter(name="*", group=_SERVER)
@dataclass(frozen=True, kw_only=True)
class FleetFlags:
    replicas: int | None = None
    """Engines behind this server, on Ray (at RAY_ADDRESS, or started here)."""
    router: Annotated[str | None, _IN_MORE] = None
    """Routing policy (affinity)."""
    placement: Annotated[str | None, _IN_MORE] = None
    """Placement policy, which loads adapters in advance (none)."""
    autoscale: Annotated[str | None, _IN_MORE] = None
    """Number of replicas by the waiting work: waiting_work:least=1,most=4 (always --replicas)."""
    cpus_per_replica: Annotated[int | None, _IN_MORE] = None
    """CPUs and threads of each replica (1)."""
    migration_limit: Annotated[int | None, _IN_MORE] = None
    """How often a request may continue on another replica after losing its own (3)."""
    registry: Annotated[str | None, _IN_MORE] = None
    """Folder or URL of the fleet's adapter registry."""
    app_name: Annotated[str | None, _IN_MORE] = None
    """Name of the Serve application (aioengine)."""

    def fleet_config(
        self,
        engine: EngineConfig,
        adapters: dict[str, str],
        otlp_endpoint: str | None = None,
        file: Path | None = None,
    ) -> FleetConfig | None:
        """Return the table ``[fleet]`` of ``file``, overridden by the flags. None if there is neither: one
        engine in this process. Raises ConfigError."""
        table = fleet_table(file)
        own = given(self)
        if table is None:
            if not own:
                return None
            if self.replicas is None:
                raise ConfigError(f"--{next(iter(own)).replace('_', '-')}: needs a fleet; add --replicas")
        for name in ELSEWHERE.keys() & (table or {}).keys():
            raise ConfigError(f"{file}, table fleet: `aioengine serve` reads {name} from {ELSEWHERE[name]}")
        if self.app_name is not None:
            own["name"] = own.pop("app_name")
        values = {**(table or {}), "otlp_endpoint": otlp_endpoint, **own}
        source = "flags" if file is None else f"{file} and flags"
        return FleetConfig.from_table(engine, adapters, values, source=source)
